"""What does it cost to watch runners that do nothing? Beside a loop that asks each one's health once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import psutil
from rich.table import Table

from mlxsup.testing import fake_runner
from tests.bench.figures import MIB, Usage, grid, loop_name, ratio
from tests.bench.programs import Daemon, daemon, entries, pids, program

RUNNERS = 20
SETTLE = 2.0
ENTRY = fake_runner(address="tcp", keep_alive=-1)


async def measure(repeats: int) -> Table:
    """Watch the watchers for as many seconds as `repeats`, and all of them at the same time."""
    table = grid(
        f"idle: what a supervisor uses while nothing is asked of it, over {repeats} s",
        "CPU in shares of one core, all threads; memory in MiB",
        *("program", "CPU", "/ first row", "switches/s", "RSS", "PSS", "sentinel RSS", "PSS"),
    )
    async with AsyncExitStack() as stack:
        full = await stack.enter_async_context(daemon(entries(RUNNERS, ENTRY)))
        await full.load(*entries(RUNNERS, ENTRY))
        empty = await stack.enter_async_context(daemon(entries(RUNNERS, ENTRY)))
        runners = await full.runners()
        addresses = [runner["address"] for runner in runners.values()]
        poller = await stack.enter_async_context(program("-m", "tests.bench.polling", loop_name(), *addresses))
        await asyncio.sleep(SETTLE)
        usages = {pid: Usage(pid) for pid in (full.pid, empty.pid, poller.pid)}
        await asyncio.sleep(repeats)
        found = {pid: (usage.cpu / usage.seconds, usage.switches / usage.seconds) for pid, usage in usages.items()}
        for what, pid, sentinel in (
            (f"daemon, {RUNNERS} ready runners", full.pid, _sentinel(full, runners)),
            ("daemon, no runner yet", empty.pid, None),
            (f"asking {RUNNERS} healths once a second", poller.pid, None),
        ):
            cpu, switches = found[pid]
            used = (f"{100 * cpu:.2f} %", ratio(cpu, found[full.pid][0]), f"{switches:.0f}")
            table.add_row(what, *used, *_memory(pid), *_memory(sentinel))
    return table


def _sentinel(served: Daemon, runners: Mapping[str, Mapping[str, Any]]) -> int | None:
    known = pids(runners.values())
    return next((child.pid for child in psutil.Process(served.pid).children() if child.pid not in known), None)


def _memory(pid: int | None) -> tuple[str, str]:
    if pid is None:
        return "", ""
    found = psutil.Process(pid).memory_full_info()
    return f"{found.rss / MIB:.1f}", f"{getattr(found, 'pss', 0) / MIB:.1f}"
