"""`mlxsup ps`, `load` and `stop` against a running daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsup.report import MemoryReport, RunnerReport
from mlxsup.testing import fake_runner
from tests.daemon.children import alive, command, serving, write_config


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_a_model_is_loaded_listed_and_stopped(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner(), "broken": fake_runner("stderr=no weights; exit=3")})
    async with serving(config) as daemon:
        at = ("--url", daemon.url)
        assert await command("load", "m", *at, cwd=tmp_path) == (0, "", [])
        pid = await daemon.pid_of("m")
        code, _, lines = await command("load", "broken", *at, cwd=tmp_path)
        assert (code, len(lines)) == (1, 1)
        assert "no weights" in lines[0]
        code, out, lines = await command("ps", *at, cwd=tmp_path)
        assert (code, lines) == (0, [])
        head, first, second = out.splitlines()
        assert head.split() == [
            "MODEL",
            "STATE",
            "PID",
            "MEMORY",
            "ACTIVE",
            "QUEUE",
            "EXPIRES",
            "NOTE",
            "LAST",
            "ERROR",
        ]
        assert first.split()[:3] == ["m", "ready", str(pid)]
        assert " in 4m " in first
        assert second.split()[0] == "broken"
        assert "  exit code 3  " in second
        assert "no weights" in second
        code, out, _ = await command("ps", "--json", *at, cwd=tmp_path)
        assert json.loads(out)["runners"][0]["pid"] == pid
        assert await command("explain", "m", *at, cwd=tmp_path) == (0, "granted at once: it is ready\n", [])
        assert await command("stop", "m", *at, cwd=tmp_path) == (0, "", [])
        assert not alive(pid)
        assert await command("stop", "m", "--force", *at, cwd=tmp_path) == (0, "", [])
        code, _, lines = await command("stop", "mm", *at, cwd=tmp_path)
        assert code == 2
        assert "did you mean m?" in lines[0]


def test_a_row_tells_what_a_person_wants_to_know() -> None:
    from mlxsup.cli.runners import _row, _table

    loading = RunnerReport(
        model="m",
        engine="command",
        path="",
        aliases=[],
        state="starting",
        pid=7,
        progress=0.41,
        memory=MemoryReport(estimated=3 << 30),
        leases=2,
        queue=1,
        expires=1000.0,
        note="waiting",
        last_error="a\nb",
    )
    assert _row(loading, 1000.0 - 3700) == (
        "m",
        "starting 41%",
        "7",
        "~3.0 GiB",
        "2",
        "1",
        "in 1h 1m",
        "waiting",
        "a b",
    )
    assert _row(loading, 1000.0 - 250)[6] == "in 4m 10s"
    assert _row(loading, 1000.0 + 5)[6] == "in 0s"
    assert _table([("A", "LONG"), ("wide", "x")]) == "A     LONG\nwide  x\n"
