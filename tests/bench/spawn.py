"""How long does a spawn hold the loop? Beside a bare create_subprocess_exec with PIPEs, in a small program and a large one."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from types import TracebackType
from typing import Any, Self

import psutil
import uvloop
from rich.table import Table

import mlxsup.daemon.server  # noqa: F401 - what a daemon has in memory
from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.runners.output import OutputRecord
from mlxsup.runners.process import Process
from mlxsup.testing import fake_runner
from tests.bench.figures import MIB, grid, loop_name, ms, quantile, ratio
from tests.bench.programs import outcome

BALLAST = (0, 1024)
CHILD = ("sleep", "60")


class Hold:
    """The longest time between two turns of the loop while this is entered."""

    def __init__(self) -> None:
        self.longest = 0.0

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        self._next = asyncio.get_running_loop().call_soon(self._turn)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turn()
        self._next.cancel()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._last)
        self._last = now
        self._next.cancel()
        self._next = asyncio.get_running_loop().call_soon(self._turn)


async def measure(repeats: int) -> Table:
    """Spawn in programs of both sizes."""
    spawns = 12 * repeats
    table = grid(
        "spawn: for how long a spawn holds the loop",
        f"p50 / p99 of {spawns} spawns, and the median (worst) of {repeats} loads from asked for to ready; ms",
        *("resident", "ours", "bare, with PIPEs", "p99 bare / ours", "a whole load"),
    )
    for ballast in BALLAST:
        words = ("-m", "tests.bench.spawn", loop_name(), str(ballast), str(spawns), str(repeats))
        found: dict[str, Any] = await outcome(*words)
        ours, bare = found["ours"], found["bare"]
        table.add_row(
            f"{found['resident'] / MIB:.0f} MiB",
            _p50_p99(ours),
            _p50_p99(bare),
            ratio(quantile(bare, 0.99), quantile(ours, 0.99)),
            ms(found["loads"]),
        )
    return table


def _p50_p99(seconds: list[float]) -> str:
    return f"{quantile(seconds, 0.5) * 1000:.1f} / {quantile(seconds, 0.99) * 1000:.1f}"


# Inside the programs


async def main(ballast: int, spawns: int, loads: int) -> None:
    kept = bytearray(os.urandom(4096)) * (ballast * MIB // 4096)
    await _ours()  # what is done once is not what a spawn costs
    await _bare()
    found: dict[str, Any] = {"resident": psutil.Process().memory_info().rss, "ours": [], "bare": []}
    for _ in range(spawns):
        found["ours"].append(await _ours())
        found["bare"].append(await _bare())
    found["loads"] = await _loads(loads)
    assert len(kept) == ballast * MIB
    sys.stdout.write(json.dumps(found))


async def _ours() -> float:
    output = OutputRecord(lambda *_, **__: None)
    with Hold() as hold:
        process = await Process.spawn(CHILD, env=dict(os.environ), cwd=None, mark=secrets.token_hex(8), output=output)
    watching = asyncio.create_task(process.watch())
    os.kill(process.pid, 9)
    await watching
    return hold.longest


async def _bare() -> float:
    pipe = asyncio.subprocess.PIPE
    with Hold() as hold:
        child = await asyncio.create_subprocess_exec(*CHILD, stdout=pipe, stderr=pipe, start_new_session=True)
    child.kill()
    await child.communicate()
    return hold.longest


async def _loads(count: int) -> list[float]:
    holds = []
    async with Supervisor(parse({"models": {"fake": fake_runner()}}, KEYS)) as sup:
        for _ in range(count):
            with Hold() as hold:
                await sup.load("fake")
            holds.append(hold.longest)
            await sup.unload("fake")
    return holds[1:] or holds


if __name__ == "__main__":
    run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
    run(main(*map(int, sys.argv[2:])))
