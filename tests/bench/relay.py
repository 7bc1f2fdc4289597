"""What does a chunk cost on its way through the daemon? Beside no relay at all, and the usual one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from rich.table import Table

from tests.bench.figures import Usage, grid, loop_name, median, ratio
from tests.bench.programs import SOURCE, daemon, program

STREAMS = (16, 64)
PAUSE = 0.01
CHUNKS = 250
BURST = 16_000
"""Chunks of a stream that is not paced."""


@dataclass
class Side:
    """Who is asked, and whose CPU time is counted."""

    name: str
    port: int
    pid: int


class Stream(asyncio.Protocol):
    """A client that reads an answer to its end and keeps none of it."""

    def __init__(self, body: bytes, port: int) -> None:
        self._request = b"POST /completion HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: %d\r\n" % (port, len(body))
        self._request += b"Content-Type: application/json\r\n\r\n" + body
        self._tail = b""
        self.size = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # of uvloop, which are no subclasses
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        self._tail = (self._tail + data[-64:])[-64:]
        if self._tail.endswith(b"0\r\n\r\n") and not self.ended.done():
            self.ended.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"the answer broke off: {self._tail!r}"))


@asynccontextmanager
async def sides(kind: str) -> AsyncIterator[list[Side]]:
    """One runner, asked directly, through the daemon, and through the usual relay of that kind."""
    async with daemon({"source": SOURCE}) as served:
        await served.load("source")
        runner = (await served.runners())["source"]
        url = f"http://{runner['address']}/completion"
        pipe = asyncio.subprocess.PIPE
        async with program("-m", "tests.bench.usual", loop_name(), kind, url, stdout=pipe) as usual:
            assert usual.stdout is not None
            port = int(await usual.stdout.readline())
            yield [
                Side("no relay: the runner itself", int(runner["address"].rpartition(":")[2]), runner["pid"]),
                Side("daemon", served.port, served.pid),
                Side(_USUAL[kind], port, usual.pid),
            ]


_USUAL = {"blocks": "usual: iter_any, write", "lines": "parse each line, write it anew"}


async def ask(side: Side, prompt: str, streams: int) -> tuple[float, float, int]:
    """Ask for so many answers at once; returns seconds, CPU seconds of who answers, bytes."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"model": "source", "prompt": prompt}).encode()
    usage, began = Usage(side.pid), time.perf_counter()
    opened = [
        await loop.create_connection(lambda: Stream(body, side.port), "127.0.0.1", side.port) for _ in range(streams)
    ]
    await asyncio.gather(*(stream.ended for _, stream in opened))
    return time.perf_counter() - began, usage.cpu, sum(stream.size for _, stream in opened)


async def measure(repeats: int) -> Table:
    """Ask each side in turn, for paced streams and for a burst."""
    rounds = max(3, repeats // 10)
    table = grid(
        "relay: CPU time of the relaying process for each chunk of 60 bytes",
        f"medians of {rounds} rounds; us. Paced: one each {PAUSE * 1000:g} ms a stream; burst: as fast as they are taken",
        *("relay", *(f"{streams} streams" for streams in STREAMS), f"/ daemon at {STREAMS[-1]}"),
        *(f"burst, {STREAMS[0]} streams: chunks/s", "/ daemon"),
    )
    async with sides("blocks") as who:
        costs: dict[tuple[str, int], list[float]] = {}
        bursts: dict[str, list[float]] = {}
        for _ in range(rounds):
            for side in who:
                for streams in STREAMS:
                    _, cpu, _ = await ask(side, f"chunks {CHUNKS} {PAUSE}", streams)
                    costs.setdefault((side.name, streams), []).append(cpu / (streams * CHUNKS))
                took, _, _ = await ask(side, f"chunks {BURST} 0", STREAMS[0])
                bursts.setdefault(side.name, []).append(STREAMS[0] * BURST / took)
    ours = who[1].name
    for side in who:
        cost = [median(costs[side.name, streams]) for streams in STREAMS]
        burst = median(bursts[side.name])
        table.add_row(
            side.name,
            *(f"{1e6 * seconds:.1f}" for seconds in cost),
            ratio(cost[-1], median(costs[ours, STREAMS[-1]])),
            f"{burst:,.0f}",
            ratio(burst, median(bursts[ours])),
        )
    return table
