"""`--keep-alive` of `mlxsup run` and `load`: it reaches the daemon, and what is none is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsup.cli import main
from mlxsup.cli.client import Client
from mlxsup.testing import fake_runner
from tests.daemon.children import command, serving, write_config


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_it_holds_in_the_daemon(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("tokens=1")})
    async with serving(config) as daemon, Client(daemon.url) as client:
        at = ("--url", daemon.url)
        assert (await command("run", "m", "p", "--keep-alive", "-1", *at, cwd=tmp_path))[0] == 0
        (found,) = await client.runners()
        assert (found.state, found.expires) == ("ready", None)
        assert (await command("load", "m", "--keep-alive", "2h", *at, cwd=tmp_path))[0] == 0
        (found,) = await client.runners()
        assert found.expires is not None
        assert found.last_used is not None
        assert 7190 < found.expires - found.last_used < 7260


@pytest.mark.parametrize("line", ["run m p --keep-alive soon", "load m --keep-alive=soon"])
def test_what_is_none_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith("mlxsup: --keep-alive: expected a duration such as")
