"""What does a child that writes 100 MB without a newline do to its reader? Beside readline() and a plain pump of asyncio."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rich.table import Table

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import fake_runner
from tests.bench.figures import MIB, grid, median, peak, quantile, ratio, watch_peak
from tests.faults.house import LoopLag

SIZE = 100
"""MB (of 1024 KiB) that are written."""


@dataclass
class Sample:
    """One flood: seconds, bytes by which this process grew at most, how late its loop was, what became of it."""

    seconds: float
    grown: int
    lag: float
    end: str


async def measure(repeats: int) -> Table:
    """Flood each reader a few times, by turns."""
    rounds = max(2, repeats // 5)
    table = grid(
        f"flood: {SIZE} MB of stderr without a newline",
        f"medians of {rounds} floods; loop lag is how late a timer of 5 ms fires",
        *("reader", "memory +MiB", "loop lag p99 ms", "/ mlxsup", "s", "what is kept"),
    )
    readers: dict[str, Callable[[], Awaitable[Sample]]] = {
        "mlxsup": _ours,
        "asyncio, read(64 KiB), kept": _pump,
        "asyncio, readline()": _readline,
    }
    found: dict[str, list[Sample]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            found[name].append(await read())
    first = median([sample.lag for sample in found["mlxsup"]])
    for name, samples in found.items():
        lag = median([sample.lag for sample in samples])
        grown = median([sample.grown for sample in samples])
        seconds = median([sample.seconds for sample in samples])
        end = samples[-1].end
        table.add_row(name, f"{grown / MIB:.1f}", f"{lag * 1000:.1f}", ratio(lag, first), f"{seconds:.2f}", end)
    return table


async def _watched(read: Callable[[], Awaitable[str]]) -> Sample:
    lag = LoopLag()
    before = watch_peak(os.getpid())
    measuring = asyncio.create_task(lag.measure())
    began = time.perf_counter()
    end = await read()
    seconds = time.perf_counter() - began
    grown = max(0, peak(os.getpid()) - before)
    measuring.cancel()
    return Sample(seconds, grown, quantile(lag.lags, 0.99) if lag.lags else seconds, end)


async def _ours() -> Sample:
    entry = fake_runner(f"flood@1={SIZE}; stderr@1=the tail; tokens=1")
    async with Supervisor(parse({"models": {"fake": entry}}, KEYS)) as sup:
        await sup.load("fake")

        async def read() -> str:
            async for _ in sup.completion("fake", prompt="p"):
                pass
            while not sup.logs("fake")[-1].endswith("the tail"):
                await asyncio.sleep(0.001)
            return f"head and tail, {len(sup.logs('fake')[-1]) / 1024:.0f} KiB"

        return await _watched(read)


async def _pump() -> Sample:
    async def read() -> str:
        child = await _flooding()
        assert child.stderr is not None
        kept = bytearray()
        while block := await child.stderr.read(65536):
            kept += block
        await child.wait()
        return f"{len(kept) / MIB:.0f} MiB"

    return await _watched(read)


async def _readline() -> Sample:
    async def read() -> str:
        child = await _flooding()
        assert child.stderr is not None
        try:
            line = await child.stderr.readline()
        except ValueError as error:
            child.kill()
            return f"nothing: ValueError, {error}"
        finally:
            await child.communicate()
        return f"{len(line)} bytes"

    return await _watched(read)


async def _flooding() -> asyncio.subprocess.Process:
    null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    command = fake_runner(f"flood@start={SIZE}; exit@start=0")["command"]
    return await asyncio.create_subprocess_exec(*command, stdin=null, stderr=pipe, start_new_session=True)
