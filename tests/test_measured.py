"""What the headers of a model's files tell, and what a load of them really took: in the report, at the next load, in `estimate`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mlxsup import Supervisor
from mlxsup.cli import main
from mlxsup.learnt import Learnt
from mlxsup.testing import fake_runner
from tests.daemon.children import write_config
from tests.faults.house import collect, report
from tests.waiting import until
from tests.weights.making import STRING, gguf, key, number, tensor, text, write

MIB = 1 << 20


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model whose files were made for 4096 tokens and tell that it needs some 256 MiB, which is far too much."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    keys = [key("general.architecture", STRING, text("llama")), number("llama.context_length", 4096)]
    found = fake_runner(path=str(write(tmp_path / "m.gguf", gguf(keys, [tensor("a", [8])], 32))))
    del found["memory"]
    return found


async def taken(sup: Supervisor, name: str) -> int:
    """What one life of a model took at most, as it was looked at."""
    await collect(sup, name)
    await until(lambda: report(sup, name).memory.peak)
    await sup.unload(name)
    return report(sup, name).memory.peak


async def test_what_a_load_took_counts_for_the_next_one_before_it_is_on_disk(
    tmp_path: Path, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Supervisor.from_config(write_config(tmp_path, {"m": entry})) as sup:
        with monkeypatch.context() as slow:
            slow.setattr(Learnt, "write", lambda _: None)  # a disk that takes its time
            took = await taken(sup, "m")
            await sup.load("m")
            assert report(sup).memory.estimated == took < 200 * MIB


async def test_estimate_says_what_the_supervisor_reserves(
    tmp_path: Path, entry: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"org/m": entry})
    command = ["estimate", "org/m", "--config", str(config)]
    async with Supervisor.from_config(config) as sup:
        await sup.load("org/m")
        estimated = report(sup, "org/m").memory.estimated
        assert await asyncio.to_thread(main, [*command, "--json"]) == 0
        need = json.loads(capsys.readouterr().out)["need"]
        assert (need["source"], need["total"]) == ("estimated", estimated)
        took = await taken(sup, "org/m")
    assert await asyncio.to_thread(main, [*command, "--json"]) == 0
    need = json.loads(capsys.readouterr().out)["need"]
    assert (need["source"], need["total"], need["estimate"]) == ("learnt", took, estimated)
    assert await asyncio.to_thread(main, command) == 0
    assert "learnt, as it took so much once; by its files 256.0 MiB" in capsys.readouterr().out


async def test_the_context_a_model_was_made_for_is_in_its_report(tmp_path: Path, entry: dict[str, Any]) -> None:
    async with Supervisor.from_config(write_config(tmp_path, {"m": entry, "n": fake_runner()})) as sup:
        assert report(sup).context_length == 0  # nobody has looked at its files
        await sup.load("m")
        await sup.load("n")
        assert report(sup).context_length == 4096
        assert report(sup, "n").context_length == 0
        await sup.unload("m")
        assert report(sup).context_length == 4096
