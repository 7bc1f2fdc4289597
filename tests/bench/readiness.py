"""How soon is a ready runner known to be ready? Beside fixed polls of the same runner, in the same run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Coroutine, Sequence

import aiohttp
from rich.table import Table

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import Gate, fake_runner

LOAD_TIMES = (0.0, 0.1, 1.0, 10.0)
POLLS = (0.1, 0.25)
SIDE_BY_SIDE_FROM = 1.0
TITLE = "readiness: from the moment a runner is ready until its supervisor knows"


class Sample:
    """Delays in seconds of one load: ours, of a runner that announces itself, and of the fixed polls."""

    def __init__(self, ours: float, polls: Sequence[float]) -> None:
        self.ours = ours
        self.polls = polls


async def measure(repeats: int) -> Table:
    """Load runners that are ready after LOAD_TIMES seconds and return the table of delays."""
    table = Table(title=TITLE, caption=f"medians of {repeats} loads (10 s: fewer), worst in brackets; ms")
    for heading in ("load s", "probed", "share of load", "announced", *(f"poll {poll * 1000:g} ms" for poll in POLLS)):
        table.add_column(heading, justify="right")
    table.add_column(f"poll {POLLS[0] * 1000:g} ms / ours", justify="right")
    for load_time in LOAD_TIMES:
        count = repeats if load_time < 5 else max(3, repeats // 5)
        probed, announced = await _several(load_time, count)
        ours = [sample.ours for sample in probed]
        polls = [[sample.polls[index] for sample in probed] for index in range(len(POLLS))]
        share = f"{100 * statistics.median(ours) / load_time:.1f} %" if load_time else ""
        table.add_row(
            f"{load_time:g}",
            _shown(ours),
            share,
            _shown([sample.ours for sample in announced]),
            *(_shown(delays) for delays in polls),
            f"{statistics.median(polls[0]) / statistics.median(ours):.1f} x",
        )
    return table


def _shown(delays: Sequence[float]) -> str:
    return f"{statistics.median(delays) * 1000:.1f} ({max(delays) * 1000:.1f})"


async def _several(load_time: float, count: int) -> tuple[list[Sample], list[Sample]]:
    """Load as often as that without and with announcement: short loads by turns, long ones some at a time."""
    side_by_side = load_time >= SIDE_BY_SIDE_FROM
    step, at_once = (0.113, 5) if side_by_side else (0.013, 1)  # long ones end well apart
    probed, announced = list[Sample](), list[Sample]()
    while len(probed) < count:
        times = [load_time + step * index for index in range(min(at_once, count - len(probed)))]
        if not side_by_side:
            times = [load_time + step * len(probed)]
        for samples, announce in ((probed, False), (announced, True)):
            samples.extend(await asyncio.gather(*(_one(seconds, announce=announce) for seconds in times)))
    return probed, announced


async def _one(load_time: float, *, announce: bool) -> Sample:
    async with Gate() as gate:
        entry = fake_runner(f"gate@loading={gate.path}", address="tcp", announce=announce)
        async with Supervisor(parse({"models": {"fake": entry}}, KEYS)) as sup:
            begun = time.monotonic()
            load = asyncio.create_task(_moment(sup.load("fake")))
            arrival = await gate.arrival()
            while not sup.report("fake").address:  # the runner may be up before its spawn is over
                await asyncio.sleep(0.001)
            url = f"http://{sup.report('fake').address}/health"
            polls = [asyncio.create_task(_poll(url, poll)) for poll in POLLS]
            await asyncio.sleep(begun + load_time - time.monotonic())
            ready = time.monotonic()
            arrival.go()
            found = await asyncio.gather(load, *polls)
    return Sample(found[0] - ready, [at - ready for at in found[1:]])


async def _moment(work: Coroutine[None, None, None]) -> float:
    await work
    return time.monotonic()


async def _poll(url: str, pause: float) -> float:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url) as answer:
                if answer.status == 200:
                    return time.monotonic()
            await asyncio.sleep(pause)
