"""How soon is a death known? Beside asyncio's own Process.wait() of a child with PIPEs, alone and with a grandchild on them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from rich.table import Table

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.errors import RunnerDied
from mlxsup.testing import fake_runner
from tests.bench.figures import grid, median, ratio
from tests.bench.programs import kill_group

HELD = 0.5
"""Seconds for which the bare child's grandchild keeps the pipes open; ours keeps them until it is killed."""


async def measure(repeats: int) -> Table:
    """Kill idle runners, runners at work and bare children, each of them `repeats` times."""
    table = grid(
        "exit: from SIGKILL until it is known",
        f"{repeats} times each; ms. Each of our runners has a grandchild that holds its pipes",
        *("who learns what", "median", "worst", "/ first row"),
    )
    first: float | None = None
    for what, times in (
        ("mlxsup: the idle runner is not ready any more", await _of_ours(_state_leaves, repeats)),
        ("mlxsup: its open stream raises", await _of_ours(_stream_raises, repeats)),
        ("asyncio: Process.wait(), PIPEs", [await _bare("exec sleep 60") for _ in range(repeats)]),
        (
            f"asyncio: the same, a grandchild holds them for {HELD:g} s",
            [await _bare(f"sleep {HELD} & wait") for _ in range(min(repeats, 10))],
        ),
    ):
        first = first or median(times)
        table.add_row(what, f"{median(times) * 1000:.1f}", f"{max(times) * 1000:.1f}", ratio(median(times), first))
    return table


async def _of_ours(kill: Callable[[Supervisor], Awaitable[float]], repeats: int) -> list[float]:
    entry = fake_runner("fork@ready=ignore; hang@1", stop_grace="1s")
    async with Supervisor(parse({"models": {"fake": entry}}, KEYS)) as sup:
        found = []
        for _ in range(repeats):
            await sup.load("fake")
            found.append(await kill(sup))
            await sup.unload("fake")
    return found


async def _state_leaves(sup: Supervisor) -> float:
    events = sup.events()
    began = _kill(sup)
    async for event in events:
        if event.previous == "ready":
            break
    took = time.perf_counter() - began
    events.close()
    return took


async def _stream_raises(sup: Supervisor) -> float:
    async with sup.completion("fake", prompt="p") as chunks:
        await anext(chunks)
        began = _kill(sup)
        try:
            await anext(chunks)
        except RunnerDied:
            return time.perf_counter() - began
    raise AssertionError("a stream of a dead runner went on")


def _kill(sup: Supervisor) -> float:
    began = time.perf_counter()
    os.kill(sup.report("fake").pid, 9)
    return began


async def _bare(script: str) -> float:
    pipe = asyncio.subprocess.PIPE
    command = ("sh", "-c", f"echo up; {script}")
    child = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, start_new_session=True)
    assert child.stdout is not None
    await child.stdout.readline()
    await asyncio.sleep(0.02)  # the grandchild is there
    began = time.perf_counter()
    child.kill()
    await child.wait()
    took = time.perf_counter() - began
    kill_group(child.pid)
    return took
