"""How soon does the daemon say how things are, while loads hang? Beside a server that does nothing but answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import aiohttp
from rich.table import Table

from mlxsup.cli.client import Client
from mlxsup.testing import fake_runner
from tests.bench.figures import grid, loop_name, median, quantile, ratio
from tests.bench.programs import LIMIT, Daemon, daemon, entries, program

MODELS, HANGING = 40, 5
ASKED = 25
"""Times each is asked for each repeat."""


async def measure(repeats: int) -> Table:
    """Ask for each kind of status in turn, and the server that does nothing."""
    table = grid(
        f"status of {MODELS} models, {HANGING} of which hang while they load",
        f"ms, one request after the other on an open connection; {repeats * ASKED} of each",
        *("what", "median", "99 of 100", "/ first row"),
    )
    pipe = asyncio.subprocess.PIPE
    async with (
        program("-m", "tests.bench.trivial", loop_name(), stdout=pipe) as trivial,
        daemon(entries(MODELS, fake_runner("load=forever; progress=0.5"))) as served,
        aiohttp.ClientSession() as http,
        Client(f"127.0.0.1:{served.port}") as client,
    ):
        assert trivial.stdout is not None
        port = int(await trivial.stdout.readline())
        loads = [asyncio.create_task(_load(http, served.port, f"m{number}")) for number in range(HANGING)]
        await _until_all_hang(served)
        asked: dict[str, Callable[[], Awaitable[object]]] = {
            "a handler of aiohttp that does nothing": lambda: _get(http, port, "/"),
            "GET /health": lambda: _get(http, served.port, "/health"),
            "GET /models": lambda: _get(http, served.port, "/models"),
            "GET /runners": lambda: _get(http, served.port, "/runners"),
            "what `mlxsup ps` asks, decoded": client.runners,
        }
        times: dict[str, list[float]] = {what: [] for what in asked}
        for _ in range(repeats * ASKED):
            for what, ask in asked.items():
                began = time.perf_counter()
                await ask()
                times[what].append(time.perf_counter() - began)
        for load in loads:
            load.cancel()
        await asyncio.wait(loads)
    least = median(next(iter(times.values())))
    for what, found in times.items():
        figures = (f"{1000 * seconds:.2f}" for seconds in (median(found), quantile(found, 0.99)))
        table.add_row(what, *figures, ratio(median(found), least))
    return table


async def _get(http: aiohttp.ClientSession, port: int, path: str) -> bytes:
    async with http.get(f"http://127.0.0.1:{port}{path}") as answer:
        assert answer.status == 200
        return await answer.read()


async def _load(http: aiohttp.ClientSession, port: int, model: str) -> None:
    async with http.post(f"http://127.0.0.1:{port}/models/load", json={"model": model}) as answer:
        await answer.read()


async def _until_all_hang(served: Daemon) -> None:
    async with asyncio.timeout(LIMIT):
        while sum(runner["pid"] > 0 for runner in (await served.runners()).values()) < HANGING:
            await asyncio.sleep(0.05)
