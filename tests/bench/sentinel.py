"""How long does anything outlive a supervisor that is killed? Beside children that asked for PR_SET_PDEATHSIG."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

from rich.table import Table

from mlxsup.testing import fake_runner
from tests.bench.figures import grid, loop_name, median, ratio
from tests.bench.programs import LIMIT, program
from tests.faults.house import Record, alive

RUNNERS = 4
PATIENCE = 1.0
SCENARIO = "fork@ready=setsid+ignore; ignore=SIGTERM+SIGINT"
"""A runner that does not go by itself, with a grandchild in a session of its own."""


async def measure(repeats: int) -> Table:
    """Kill programs that keep runners, a third as often as `repeats`."""
    count = max(3, repeats // 3)
    table = grid(
        f"sentinel: from SIGKILL of a program until nothing of its {RUNNERS} runners is left",
        f"medians of {count} kills, worst in brackets; ms. Each runner has a grandchild with a session of its own",
        *(
            "kept by",
            "runners gone",
            "grandchildren gone",
            f"kills with some left after {PATIENCE:g} s",
            "runners / ours",
        ),
    )
    ours = [await _kill_ours() for _ in range(count)]
    bare = [await _kill_bare() for _ in range(count)]
    first = _median([runners for runners, _ in ours])
    for who, found in (("mlxsup", ours), ("PR_SET_PDEATHSIG", bare)):
        runners, forks = [one[0] for one in found], [one[1] for one in found]
        left = sum(None in one for one in found)
        table.add_row(who, _shown(runners), _shown(forks), str(left), ratio(_median(runners), first))
    return table


def _median(times: list[float | None]) -> float:
    return median([PATIENCE if took is None else took for took in times])


def _shown(times: list[float | None]) -> str:
    if None in times:
        return "never"
    return f"{_median(times) * 1000:.0f} ({max(took or 0 for took in times) * 1000:.0f})"


async def _kill_ours() -> tuple[float | None, float | None]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        record = Record(Path(folder))
        models = {f"m{index}": fake_runner(f"record={record.path}; {SCENARIO}") for index in range(RUNNERS)}
        states = json.dumps(dict.fromkeys(models, "ready"))
        return await _kill(record, "-m", "tests.faults.keeper", loop_name(), json.dumps(models), states)


async def _kill_bare() -> tuple[float | None, float | None]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        record = Record(Path(folder))
        scenario = f"record={record.path}; {SCENARIO}"
        return await _kill(record, "-m", "tests.bench.deathsig", loop_name(), str(RUNNERS), scenario, folder)


async def _kill(record: Record, *arguments: str) -> tuple[float | None, float | None]:
    """Seconds until the runners were gone, and until their grandchildren were; None for too long."""
    try:
        async with program(*arguments, stdout=asyncio.subprocess.DEVNULL) as keeper, asyncio.timeout(LIMIT):
            while len(record.pids("fork")) < RUNNERS or len(record.lines("ready")) < RUNNERS:
                await asyncio.sleep(0.01)
            began = time.perf_counter()
            keeper.kill()
            both = (_gone(record.pids(), began), _gone(record.pids("fork"), began))
            runners, forks = await asyncio.gather(*both)
            return runners, forks
    finally:
        for pid in record.pids() + record.pids("fork"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


async def _gone(pids: list[int], began: float) -> float | None:
    while any(map(alive, pids)):
        await asyncio.sleep(0.002)
        if time.perf_counter() - began > PATIENCE:
            return None
    return time.perf_counter() - began
