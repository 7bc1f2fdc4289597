"""`python -m tests.soak.laps LOOP CYCLES [--trace]`: one process and one loop that goes through lives of runners and counts.

Prints the looks it took as JSON, the first when it was warm and before the cycles that count. With `--trace` it writes to stderr which lines of code hold
more memory at the end than when it was warm.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import random
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from mlxsup import Supervisor
from mlxsup.api import create_app
from mlxsup.config import parse
from mlxsup.daemon import heap
from mlxsup.engines import KEYS
from mlxsup.learnt import LEARNT_FILE, LOCK_FILE
from mlxsup.registry import OBSERVE_EVERY
from tests.soak.counting import Look, look
from tests.soak.folders import own_folders
from tests.soak.lives import LIVES, House, models

LANES = 2
LAPS = 8
WARM_UP = 1000
"""Cycles before the first look, more if a lap is longer: caches must be full, and the heap have found its size."""
FRAMES = 12
SHOWN = 25


async def run(cycles: int, *, trace: bool) -> list[Look]:
    """Get warm, then go through so many cycles in laps, and look around after each."""
    share = cycles // LAPS // LANES
    before: tracemalloc.Snapshot | None = None
    async with Supervisor(parse({"models": models(LANES)}, KEYS)) as sup, AsyncExitStack() as stack:
        house = House(sup, await _client(sup, stack))
        lanes = [_names(lane) for lane in range(LANES)]
        if trace:
            tracemalloc.start(FRAMES)
        await _lap(house, lanes, max(share, WARM_UP // LANES))
        looks = [look(sup, 0)]
        for lap in range(1, LAPS + 1):
            await _lap(house, lanes, share)
            looks.append(look(sup, lap * share * LANES))
            if trace and before is None:
                before = tracemalloc.take_snapshot()
    if before is not None:
        _show(before, tracemalloc.take_snapshot())
    return looks


class _Faults(logging.Handler):
    """Keeps what is logged with a traceback: nothing of that kind may happen here."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(logging.Formatter().format(record))


async def _lap(house: House, lanes: list[Iterator[str]], share: int) -> None:
    await asyncio.gather(*(_lead(house, itertools.islice(lane, share)) for lane in lanes))
    await asyncio.sleep(OBSERVE_EVERY + 0.2)  # what is kept open to look at runners is let go at the next look


def _names(lane: int) -> Iterator[str]:
    """All models of a lane, in an order that differs each time and is the same in every run."""
    names, shuffle = [*models(LANES)], random.Random(lane).shuffle
    mine = [name for name in names if name.startswith(f"{lane}-")]
    while True:
        shuffle(mine)
        yield from mine


async def _lead(house: House, names: Iterator[str]) -> None:
    for name in names:
        life = LIVES[name.split("-", 2)[2].replace("-", " ")]
        try:
            async with asyncio.timeout(60):
                await life.lead(house, name)
        except Exception as error:
            error.add_note(f"in the life of {name}: {house.sup.report(name)}")
            raise


async def _client(sup: Supervisor, stack: AsyncExitStack) -> aiohttp.ClientSession:
    """Serve the API on a unix socket, and return a client of it."""
    runner = web.AppRunner(create_app(sup), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    path = str(Path(os.environ["TMPDIR"]) / "api")
    await web.UnixSite(runner, path).start()
    connector = aiohttp.UnixConnector(path, force_close=True)
    return await stack.enter_async_context(aiohttp.ClientSession("http://localhost", connector=connector))


def _show(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot) -> None:
    ignored = (tracemalloc.Filter(inclusive=False, filename_pattern=tracemalloc.__file__),)
    changes = after.filter_traces(ignored).compare_to(before.filter_traces(ignored), "traceback")
    for change in [change for change in changes if change.size_diff > 0][:SHOWN]:
        sys.stderr.write(f"+{change.size_diff} bytes in {change.count_diff:+d} blocks\n")
        sys.stderr.write("\n".join(change.traceback.format(most_recent_first=True)[: FRAMES * 2]) + "\n")


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.laps", description=__doc__)
    parser.add_argument("loop", choices=("asyncio", "uvloop"))
    parser.add_argument("cycles", type=int)
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    heap.share_one()  # as the daemon does
    faults = _Faults(logging.WARNING)
    log = logging.getLogger("mlxsup")
    log.addHandler(faults)
    log.propagate = False  # runners that die here die on purpose
    with own_folders() as folder:
        loop = uvloop if options.loop == "uvloop" else asyncio
        looks = loop.run(run(options.cycles, trace=options.trace))
        found = Path(folder, "xdg").rglob("*/*")
        left = sorted(str(path.relative_to(folder)) for path in found if path.name not in (LEARNT_FILE, LOCK_FILE))
    if faults.found:
        sys.exit(f"{len(faults.found)} tracebacks in the log, the first: {faults.found[0]}")
    if left:
        sys.exit(f"left in the temporary folder: {', '.join(left)}")
    sys.stdout.write(msgspec.json.encode(looks).decode())


if __name__ == "__main__":
    main()
