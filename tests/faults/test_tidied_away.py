"""The folder of sockets is tidied away under a supervisor that lives: models load all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import msgspec
import pytest

from mlxsup.records import Record
from mlxsup.statefiles import state_directory
from mlxsup.testing import fake_runner
from tests.waiting import until

from .house import collect, report, supervisor, words

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("taken", [False, True])
async def test_a_model_loads_though_the_folder_of_sockets_is_gone(
    taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervisor(m=fake_runner(), n=fake_runner()) as sup:
        await sup.load("m")
        folder = Path(report(sup, "m").address.removeprefix("unix:")).parent
        await anyio.to_thread.run_sync(shutil.rmtree, folder)
        if taken:  # by somebody else, as far as one can tell
            folder.touch()
        assert words(await collect(sup, "n")) == "t1 t2 t3 "
        now = Path(report(sup, "n").address.removeprefix("unix:")).parent
        assert (now == folder) is not taken
        (record,) = state_directory().glob("*/record.json")
        await until(lambda: msgspec.json.decode(record.read_bytes(), type=Record).folder == str(now))
        await sup.unload("m")
        assert words(await collect(sup, "m")) == "t1 t2 t3 "
        if taken:
            folder.unlink()
    assert not now.exists()
    assert "unexpected" not in caplog.text
