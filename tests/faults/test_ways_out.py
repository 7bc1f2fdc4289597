"""What goes wrong while a runner drains or stops: the answer is whole or an error, and nothing is left, as at any other time."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import CompletionChunk, Supervisor
from mlxsup.errors import BadAnswer, LoadFailed, MlxsupError, RunnerDied, Unloaded
from mlxsup.testing import Arrival, Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import LoopLag, Record, alive, collect, kill, report, state_is, supervisor, words

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a process that left the group is found in /proc")
TAIL = "stderr@{0}=; stderr@{0}=the tail"


class Draining:
    """A model of which one answer stands at a gate, and that is being unloaded."""

    def __init__(self, sup: Supervisor, arrival: Arrival, work: asyncio.Task[Any], unload: asyncio.Task[None]) -> None:
        self.sup, self.arrival, self.work, self.unload = sup, arrival, work, unload
        self.pid = report(sup).pid

    async def answer(self) -> tuple[list[CompletionChunk], MlxsupError | None]:
        """Let the answer go on; returns its chunks once the model is unloaded too."""
        self.arrival.go()
        async with asyncio.timeout(LIMIT):
            found: tuple[list[CompletionChunk], MlxsupError | None] = await self.work
            await self.unload
        return found


@asynccontextmanager
async def draining(scenario: str = "", **keys: Any) -> AsyncIterator[Draining]:
    """Make such a model; what the scenario says for phase 1 happens behind the gate."""
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@1={gate.path}; {scenario}", **keys)) as sup:
        work = asyncio.create_task(_outcome(sup))
        arrival = await gate.arrival()
        unload = asyncio.create_task(sup.unload("m"))
        await state_is(sup, "draining")
        it = Draining(sup, arrival, work, unload)
        yield it
        assert report(sup).state in ("stopped", "backoff", "failed")
        assert report(sup).pid == -1
        assert report(sup).leases == 0
        assert not alive(it.pid)
        gate.open()


async def _outcome(sup: Supervisor) -> tuple[list[CompletionChunk], MlxsupError | None]:
    chunks: list[CompletionChunk] = []
    try:
        async for chunk in sup.completion("m", prompt="p"):
            chunks.append(chunk)  # noqa: PERF401 - those before an error count
    except MlxsupError as error:
        return chunks, error
    return chunks, None


@pytest.mark.parametrize(
    ("scenario", "text", "kind"),
    [
        ("flood@1=100; delay@1=0.01", "t1 t2 t3 ", None),
        *[(f"flood@1=4:{kind}", "t1 t2 t3 ", None) for kind in ("lines", "bars", "binary", "utf8")],
        *[(f"close@1={which}", "t1 t2 t3 ", None) for which in ("stdout", "stderr", "both")],
        ("split=1", "t1 t2 t3 ", None),
        ("split=7; pause=0.001", "t1 t2 t3 ", None),
        ("big@1=64", "t1 " + "x" * 64 * MIB + "t2 t3 ", None),
        (r'line@1={"content":"\\u0000"}', "t1 \0t2 t3 ", None),
        (r"line@1=\x00\x00", "t1 ", BadAnswer),
        ("half@1; cut=close", "t1 ", BadAnswer),
        ("half@1; cut=end", "t1 ", BadAnswer),
        ("http=1.0; half@1", "t1 ", BadAnswer),
        ("done=no", "t1 t2 t3 ", BadAnswer),
        ("exit@1=0", "t1 ", RunnerDied),
        ("exit@1=3; stderr@crash=no more paper", "t1 ", RunnerDied),
        ("crash@1=SIGABRT", "t1 ", RunnerDied),
    ],
)
async def test_an_answer_is_exact_or_an_error_while_its_runner_drains(
    scenario: str, text: str, kind: type[MlxsupError] | None
) -> None:
    async with draining(f"{scenario}; {TAIL.format('2')}") as it:
        chunks, error = await it.answer()
        assert words(chunks) == text
        assert (type(error) if error is not None else None) is kind
        if kind is None:
            assert chunks[-1].done
            assert "close" in scenario or it.sup.logs("m")[-1] == "the tail"


@pytest.mark.parametrize("http", ["1.0", "1.1"])
async def test_an_answer_that_is_cut_while_its_runner_drains_is_an_error_at_every_offset(http: str) -> None:
    """Many answers, each cut elsewhere, all under way when the drain begins."""
    short = 'tokens=2; line@final={"done":true}; finish@final'
    length = len('{"content":"t1 "}\n{"content":"t2 "}\n{"done":true}')  # with its newline missing it is whole
    async with Gate() as gate:
        entry = fake_runner(f"gate@first={gate.path}; http={http}; truncate=each; {short}", concurrency=length)
        async with supervisor(m=entry) as sup:
            tasks = [asyncio.create_task(_outcome(sup)) for _ in range(length)]
            arrivals = [await gate.arrival() for _ in range(length)]
            unload = asyncio.create_task(sup.unload("m"))
            await state_is(sup, "draining")
            for arrival in arrivals:
                arrival.go()
            async with asyncio.timeout(LIMIT):
                found = await asyncio.gather(*tasks)
                await unload
    assert {type(error) for _, error in found} == {BadAnswer}
    assert sorted(words(chunks) for chunks, _ in found) == [""] * 18 + ["t1 "] * 18 + ["t1 t2 "] * (length - 36)
    assert not any(chunk.done for chunks, _ in found for chunk in chunks)


@LINUX
async def test_a_runner_that_is_stopped_while_it_drains_is_ended() -> None:
    async with draining() as it:
        began = time.monotonic()
        kill(it.pid, signal.SIGSTOP)
        async with asyncio.timeout(LIMIT):
            chunks, error = await it.work
            await it.unload
        assert time.monotonic() - began < 6.0  # two looks a second apart, and room for a busy machine
        assert words(chunks) == "t1 "
        assert isinstance(error, RunnerDied | Unloaded)


async def test_a_client_that_leaves_ends_the_drain() -> None:
    async with draining() as it:
        it.work.cancel()
        async with asyncio.timeout(1.0):
            await it.arrival.left()
            await it.unload
        assert report(it.sup).state == "stopped"


async def test_a_slow_reader_gets_all_of_it_while_its_runner_drains() -> None:
    scenario = "tokens=1; " + "; ".join(["big@1=0.0625"] * 100)
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@1={gate.path}; {scenario}")) as sup:
        async with sup.completion("m", prompt="p") as chunks:
            await anext(chunks)
            arrival = await gate.arrival()
            unload = asyncio.create_task(sup.unload("m"))
            await state_is(sup, "draining")
            arrival.go()
            count = 0
            async for chunk in chunks:
                count += len(chunk.content)
                await anyio.sleep(0.002)
        assert count == 100 * MIB // 16
        async with asyncio.timeout(LIMIT):
            await unload
        assert report(sup).state == "stopped"


@pytest.mark.parametrize(
    "options", ["ignore", *(pytest.param(one, marks=LINUX) for one in ("setsid+ignore", "setsid+orphan"))]
)
@pytest.mark.parametrize("end", ["done", "death"])
async def test_a_grandchild_goes_with_a_runner_that_drains(tmp_path: Path, options: str, end: str) -> None:
    record = Record(tmp_path)
    scenario = f"record={record.path}; fork@1={options}; " + ("crash@2" if end == "death" else "")
    async with draining(scenario, stop_grace="0.5s") as it:
        _, error = await it.answer()
        assert isinstance(error, RunnerDied) == (end == "death")
        (pid,) = record.pids("fork")
        await until(lambda: not alive(pid))


@pytest.mark.parametrize(
    "options", ["ignore", *(pytest.param(one, marks=LINUX) for one in ("setsid+ignore", "setsid+orphan"))]
)
@pytest.mark.parametrize("phase", ["start", "loading", "1"])
@pytest.mark.parametrize("end", ["unload", "death"])
async def test_a_grandchild_goes_with_a_runner_that_starts_or_works(
    tmp_path: Path, phase: str, options: str, end: str
) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        entry = fake_runner(
            f"record={record.path}; fork@{phase}={options}; gate@{phase}={gate.path}", stop_grace="0.5s"
        )
        async with supervisor(m=entry) as sup:
            work = asyncio.create_task(_outcome(sup))
            await gate.arrival()
            await until(lambda: report(sup).pid > 0)  # the child may be quicker than the loop that has started it
            (pid,) = record.pids("fork")
            assert alive(pid)
            async with asyncio.timeout(3.0):
                if end == "unload":
                    await sup.unload("m", force=True)
                    assert not alive(pid)
                else:
                    kill(report(sup).pid)
                _, error = await work
            died = LoadFailed if phase != "1" else RunnerDied
            assert isinstance(error, Unloaded if end == "unload" else died)
            await until(lambda: not alive(pid))
            assert not alive(record.pids()[0])


# While it stops


@asynccontextmanager
async def stopping(scenario: str = "", **keys: Any) -> AsyncIterator[tuple[Supervisor, Arrival, asyncio.Task[None]]]:
    """A model that was asked to stop and stands at a gate; what the scenario says for `sigterm` happens behind it."""
    keys.setdefault("stop_grace", "60s")
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@sigterm={gate.path}; {scenario}", **keys)) as sup:
        await sup.load("m")
        unload = asyncio.create_task(sup.unload("m"))
        arrival = await gate.arrival()
        pid = report(sup).pid
        assert report(sup).state == "stopping"
        yield sup, arrival, unload
        async with asyncio.timeout(LIMIT):
            await unload
        assert report(sup).state == "stopped"
        assert report(sup).exits == 1
        assert not alive(pid)
        gate.open()
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_a_runner_that_is_killed_while_it_stops_is_gone_at_once() -> None:
    async with stopping() as (sup, _, unload):
        kill(report(sup).pid)
        async with asyncio.timeout(1.0):
            await unload
        assert report(sup).exit_signal == signal.SIGKILL


@pytest.mark.parametrize("scenario", ["close@sigterm=both", "exit@sigterm=3", "crash@sigterm=SIGABRT"])
async def test_whatever_a_runner_does_while_it_stops_it_is_stopped(scenario: str) -> None:
    async with stopping(scenario) as (_, arrival, _):
        arrival.go()


@pytest.mark.parametrize("kind", ["plain", "lines", "bars", "binary", "utf8"])
async def test_what_a_runner_writes_while_it_stops_holds_up_nobody(kind: str) -> None:
    size = 100 if kind == "plain" else 4
    async with stopping(f"flood@sigterm={size}:{kind}; {TAIL.format('sigterm')}") as (sup, arrival, unload):
        lag = LoopLag()
        measuring = asyncio.create_task(lag.measure())
        arrival.go()
        async with asyncio.timeout(LIMIT):
            await unload
        measuring.cancel()
        assert sup.logs("m")[-1] == "the tail"
        assert sum(map(len, sup.logs("m"))) < 2 * MIB
        assert lag.at(0.99) < 0.25  # the figure is 0.02, on a machine with nothing else to do


# Races


async def test_unloading_one_that_waits_for_its_next_try_tells_who_waits() -> None:
    async with supervisor(m=fake_runner("exit@start=1")) as sup:
        with pytest.raises(LoadFailed):
            await sup.load("m")
        waiting = asyncio.create_task(_outcome(sup))
        await state_is(sup, "backoff")
        assert report(sup).queue == 1
        async with asyncio.timeout(LIMIT):
            await sup.unload("m")
            chunks, error = await waiting
        assert (chunks, type(error)) == ([], Unloaded)
        assert report(sup).state == "stopped"
        await sup.unload("m")
        with pytest.raises(LoadFailed):
            await sup.load("m")
