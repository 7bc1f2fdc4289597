"""Looks at real processes: what is free, what each model has, by its own word too where that is more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxsup import threads
from mlxsup.learnt import Learnt
from mlxsup.machine import Machine
from mlxsup.protocol import RunnerMemory
from mlxsup.runners.footprint import Observer, Watched

pytestmark = pytest.mark.anyio

MIB = 1 << 20
SIZE = 64 * MIB

SHARING = """
import mmap, os, signal, sys
with open(sys.argv[1], "rb") as file:
    shared = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(shared[at] for at in range(0, len(shared), 4096))
os.write(1, b"up\\n")
signal.pause()
"""


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[list[int]]:
    """The pids of two programs that have the same 64 MiB of a file in memory."""
    path = tmp_path / "weights"
    path.write_bytes(b"w" * SIZE)
    argv = [sys.executable, "-I", "-S", "-c", SHARING, str(path)]
    with ExitStack() as stack:
        programs = [stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE)) for _ in range(2)]
        for program in programs:
            stack.callback(program.kill)
            assert program.stdout is not None
            assert program.stdout.readline() == b"up\n"
        yield [program.pid for program in programs]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(Learnt(tmp_path))
    made.find_devices()
    yield made
    made.close()


def watched(pids: list[int], machine: Machine, told: RunnerMemory | None = None) -> dict[str, Watched]:
    return {f"m{pid}": Watched(pid, {machine.home: 2 * SIZE}, told=told) for pid in pids}


@pytest.mark.skipif(sys.platform != "linux", reason="psutil tells no shared pages elsewhere")
async def test_shared_weights_are_counted_once_for_who_waits_for_memory(machine: Machine, sharing: list[int]) -> None:
    runners = watched(sharing, machine)
    plain = await machine.look(runners)
    resident = sum(psutil.Process(pid).memory_info().rss for pid in sharing)
    assert _sum(plain.used) == pytest.approx(resident, abs=4 * MIB)
    assert plain.used == plain.needed
    assert abs(plain.free[machine.home] - psutil.virtual_memory().available) < 4 << 30
    shared = await machine.look(runners, thorough=True)
    assert _sum(plain.used) - _sum(shared.used) > 0.9 * SIZE
    assert _sum(shared.needed) == pytest.approx(resident, abs=4 * MIB)
    assert _sum((await machine.look(runners)).used) == _sum(shared.used)


@pytest.mark.skipif(sys.platform != "linux", reason="looks are made in threads elsewhere")
async def test_a_common_look_takes_no_thread(
    machine: Machine, sharing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
        taken.append(work.__name__)
        return await threads.in_thread(work, *arguments)

    monkeypatch.setattr("mlxsup.machine.in_thread", in_thread)
    monkeypatch.setattr(Observer, "WALK_IDLE", 1e9)
    monkeypatch.setattr("mlxsup.machine.SURVEY_EVERY", 1e9)
    runners = watched(sharing, machine)
    for _ in range(5):
        await machine.look(runners)
    assert taken == ["study", "survey"]  # the first time
    await machine.look(runners, thorough=True)
    assert set(taken[2:]) == {"study"}


async def test_the_runner_s_own_word_counts_where_it_is_more(machine: Machine, sharing: list[int]) -> None:
    gib = 1 << 30
    said = RunnerMemory(active=gib, cache=MIB, peak=3 * gib)
    seen = await machine.look(watched(sharing[:1], machine, said))
    assert _sum(seen.used) == gib + MIB
    assert _sum(seen.needed) == 3 * gib
    less = await machine.look(watched(sharing[:1], machine, RunnerMemory(active=1)))
    assert SIZE < _sum(less.used) < 2 * SIZE
    nonsense = await machine.look(watched(sharing[:1], machine, RunnerMemory(active=1 << 60)))
    assert nonsense.used == less.used


def _sum(use: dict[str, dict[str, int]]) -> int:
    return sum(size for figures in use.values() for size in figures.values())
