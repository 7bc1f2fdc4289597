"""`python -m tests.bench [--long] [NAME ...]`: run the measurements named, or all of them, on each event loop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable

import uvloop
from rich.console import Console
from rich.table import Table

from tests.bench import deciding, exits, flood, idle, passage, readiness, relay, sentinel, spawn, status

BENCHES: dict[str, Callable[[int], Awaitable[Table]]] = {
    "readiness": readiness.measure,
    "spawn": spawn.measure,
    "exit": exits.measure,
    "sentinel": sentinel.measure,
    "idle": idle.measure,
    "flood": flood.measure,
    "relay": relay.measure,
    "passage": passage.measure,
    "status": status.measure,
    "decision": deciding.cost,
    "orders": deciding.orders,
}
REPEATS = 12
LONG_REPEATS = 60
WIDTH = 120
BUSY = 0.5
"""A load of this many processes a core, before anything was started, is worth a word."""


def main() -> int:
    """Print one table a measurement and loop."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--long", action="store_true", help="more of everything, for steadier figures")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHES]:
        parser.error(f"no such measurement: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    logging.getLogger("mlxsup").setLevel(logging.CRITICAL)  # runners that die here die on purpose
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    console.print(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores, load {load:.2f}"
    )
    if load > BUSY * cores:
        console.print("this machine has other things to do: expect worse figures than it could give", style="yellow")
    with tempfile.TemporaryDirectory(prefix="bench-") as state:
        os.environ["XDG_STATE_HOME"] = state
        for name in options.names or BENCHES:
            for loop in (asyncio, uvloop):
                console.print(loop.__name__)
                console.print(loop.run(_table(name, LONG_REPEATS if options.long else REPEATS)))
    return 0


async def _table(name: str, repeats: int) -> Table:
    return await BENCHES[name](repeats)


if __name__ == "__main__":
    sys.exit(main())
