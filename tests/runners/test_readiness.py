"""A runner is ready when its engine says so, it lives, and it is the one that listens; and it is given up in time."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, cast

import anyio
import pytest

from mlxsup.config import ModelSettings
from mlxsup.engines import ENGINES, Address, Engine, Finding, Launch, Verdict
from mlxsup.engines.base import Transport
from mlxsup.errors import LoadFailed, LoadTimeout
from mlxsup.runners import footprint
from mlxsup.runners import readiness as readiness_module
from mlxsup.runners.output import OutputRecord
from mlxsup.runners.probe import Probe, open_session
from mlxsup.runners.process import Activity, Process
from mlxsup.runners.readiness import (
    Interrupted,
    Readiness,
    StrangerListens,
    listen_for_ready_byte,
    pause,
    race,
)
from tests.waiting import LIMIT

from .children import child, model, python
from .wire_server import Exchange, saying, serving

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LOADING = b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}"
Turn = tuple[float, Finding]
READY = Finding(Verdict.READY)


def at(progress: float | None = None, detail: str = "") -> Finding:
    return Finding(Verdict.LOADING, progress, detail)


class ScriptedEngine(Engine):
    """Reads what a test wrote down instead of the answers, and lets so many seconds pass before each."""

    kind: ClassVar[str] = "scripted"

    def __init__(self, clock: Clock, turns: list[Turn]) -> None:
        self._clock = clock
        self._turns = turns
        self.asked = 0

    def check(self, model: ModelSettings) -> None:
        raise NotImplementedError

    def transport(self, model: ModelSettings) -> Transport:
        raise NotImplementedError

    def launch(self, model: ModelSettings, address: Address) -> Launch:
        raise NotImplementedError

    def read_health(self, status: int, body: bytes) -> Finding:
        self.asked += 1
        seconds, finding = self._turns.pop(0) if len(self._turns) > 1 else self._turns[0]
        self._clock.now += seconds
        return finding


class Clock:
    """Stands in for the module `time` and moves only when it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeProcess:
    """As much of a child as readiness looks at; this program's own pid is one that lives."""

    def __init__(self, now: float) -> None:
        self.pid = os.getpid()
        self.mark = "no-mark"
        self.started = now
        self.activity = Activity()
        self.output = OutputRecord(lambda stream, line, *, is_error: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time for readiness; pauses between probes are cut short, or some tests would take minutes."""
    found = Clock()
    monkeypatch.setattr(readiness_module, "time", found)
    monkeypatch.setattr(readiness_module, "MAX_PAUSE", 0.005)
    monkeypatch.setattr(footprint, "measure", lambda pid: 0)
    return found


async def waited(
    clock: Clock,
    *turns: Turn,
    load_timeout: float = 10,
    prepare: Callable[[Readiness, FakeProcess], object] = lambda readiness, process: None,
    answer: bytes = LOADING,
    unix: bool = True,
    limit: float = LIMIT,
    **keys: Any,
) -> Readiness:
    """Wait for readiness while an engine reads these findings, the last one for ever."""
    settings = model(**keys)
    process = FakeProcess(clock.now)
    async with serving(saying(answer), unix=unix) as address, open_session(address, 5) as session:
        probe = Probe(settings, ScriptedEngine(clock, list(turns) or [(0, READY)]), address, session)
        found = Readiness(settings, cast("Process", process), address, probe, load_timeout)
        prepare(found, process)
        with anyio.fail_after(limit):
            await found.wait(asyncio.get_running_loop().create_future())
    return found


class TestPause:
    @pytest.mark.parametrize(
        ("elapsed", "expected"),
        [(0, 0.002), (0.05, 0.002), (0.1, 0.002), (1, 0.02), (5, 0.1), (12.5, 0.25), (100, 0.25), (1e9, 0.25)],
    )
    def test_a_fiftieth_of_the_time_within_bounds(self, elapsed: float, expected: float) -> None:
        assert math.isclose(pause(elapsed), expected)

    def test_ready_is_known_soon_after_it_is_so(self) -> None:
        for load_time in (0.0, 0.1, 1.0, 10.0, 100.0):
            now = 0.0
            while now < load_time:
                now += pause(now)
            assert now - load_time <= max(0.010, 0.025 * load_time)


class TestRace:
    async def test_work_that_is_done_first_is_returned(self) -> None:
        assert await race(_soon("done"), _never()) == "done"

    async def test_its_error_too(self) -> None:
        async def fail() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await race(fail(), _never())

    async def test_an_interruption_ends_the_work_and_waits_for_its_end(self) -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(True)

        interrupted = _never()
        asyncio.get_running_loop().call_soon(interrupted.set_result, None)
        with pytest.raises(Interrupted):
            await race(work(), interrupted)
        assert ended == [True]

    async def test_what_was_interrupted_before_is_not_begun_in_earnest(self) -> None:
        interrupted = _never()
        interrupted.set_result(None)
        with pytest.raises(Interrupted):
            await race(_soon("done"), interrupted)

    async def test_a_tie_is_an_interruption(self) -> None:
        interrupted = _never()

        async def both() -> str:
            interrupted.set_result(None)
            return "done"

        with pytest.raises(Interrupted):
            await race(both(), interrupted)

    async def test_errors_of_the_loser_are_nobodys_concern(self) -> None:
        async def bad_loser() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("no")

        interrupted = _never()
        asyncio.get_running_loop().call_soon(interrupted.set_result, None)
        with pytest.raises(Interrupted):
            await race(bad_loser(), interrupted)

    async def test_who_is_cancelled_cancels_the_work(self) -> None:
        ended, begun = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        racing = asyncio.create_task(race(work(), _never()))
        await begun.wait()
        racing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await racing
        assert ended.is_set()


class TestReady:
    async def test_at_the_first_answer_that_says_so(self, clock: Clock) -> None:
        await waited(clock, (0, at()), (0, at()), (0, READY))

    async def test_a_runner_that_tells_is_not_asked(self, clock: Clock) -> None:
        await waited(clock, (0, at()), prepare=lambda readiness, _: readiness.tell_ready())

    async def test_without_a_health_path_it_is_enough_that_its_address_answers(self, clock: Clock) -> None:
        for unix in (True, False):
            await waited(clock, (0, at()), unix=unix, health="none", check_listener=False)

    async def test_but_not_before_it_does(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout, match="nothing answers yet"):
            await _unanswered(clock, health="none")

    @pytest.mark.parametrize(
        "told",
        [
            b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 503 No\r\nContent-Length: 40000\r\n\r\n" + b'{"a":' * 8000,
            b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\n{}",
            b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
            b"no HTTP at all\r\n\r\n",
            b"",
        ],
        ids=["500", "404", "nested", "cut", "redirect", "no HTTP", "nothing"],
    )
    async def test_an_odd_answer_is_no_readiness_and_no_failure(self, told: bytes) -> None:
        """It may come from a program that has just begun to listen."""
        answers = [told, told, OK]

        async def answer(exchange: Exchange) -> None:
            if b" /elsewhere " in exchange.head:
                await exchange.send(OK)
            else:
                asked.append(exchange.head)
                await exchange.send(answers.pop(0))

        asked: list[bytes] = []
        settings = model(check_listener=False)
        process = FakeProcess(time.monotonic())
        async with serving(answer) as address, open_session(address, 5) as session:
            probe = Probe(settings, ENGINES["command"], address, session)
            with anyio.fail_after(LIMIT):
                await Readiness(settings, cast("Process", process), address, probe, 60).wait(_never())
        assert len(asked) == 3


class TestPace:
    async def test_a_runner_that_writes_all_the_time_is_asked_every_2_ms_at_most(self) -> None:
        class Eager:
            asked = 0

            reached = False

            async def ask(self, limit: float) -> Finding:
                self.asked += 1
                process.activity.note()
                return READY if self.asked == 50 else at()

        settings = model()
        process = FakeProcess(time.monotonic())
        process.activity = _Chatter()
        began = time.monotonic()
        await Readiness(
            settings, cast("Process", process), Address(socket="/nowhere/s"), cast("Probe", Eager()), 60
        ).wait(_never())
        assert time.monotonic() - began >= 49 * readiness_module.MIN_PAUSE


class TestDeadline:
    async def test_progress_moves_it_on(self, clock: Clock) -> None:
        """Ten times six seconds, with a limit of ten."""
        found = await waited(clock, *((6, at(number / 10)) for number in range(1, 11)), (0, READY))
        assert found.progress == 1.0

    async def test_without_progress_it_comes(self, clock: Clock) -> None:
        def prepare(readiness: Readiness, process: FakeProcess) -> None:
            process.output.feed("stderr", b"opening model.gguf\n")

        with pytest.raises(LoadTimeout) as caught:
            await waited(clock, (6, at(0.3, "reading")), (6, at(0.3, "reading")), prepare=prepare)
        error = caught.value
        assert "made no progress for 10 s" in error.message
        assert "opening model.gguf" in error.message
        assert error.details["stage"] == "loading"
        assert error.details["detail"] == "reading"
        assert error.details["progress"] == 0.3
        assert error.details["last_words"] == ["opening model.gguf"]

    async def test_progress_that_goes_back_is_none(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout, match="no progress"):
            await waited(clock, (6, at(0.5)), (6, at(0.4)), (6, at(0.45)), (6, at(0.44)))

    async def test_the_same_progress_again_is_none(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout, match="no progress"):
            await waited(clock, (6, at(0.0)))

    async def test_output_is_none(self, clock: Clock) -> None:
        def chatter(readiness: Readiness, process: FakeProcess) -> None:
            process.activity = _Chatter()

        with pytest.raises(LoadTimeout, match="no progress"):
            await waited(clock, (3, at()), prepare=chatter)

    async def test_memory_that_grows_moves_it_on(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = iter(range(100 << 20, 1 << 40, 10 << 20))
        monkeypatch.setattr(footprint, "measure", lambda pid: next(sizes))
        await waited(clock, *((6, at()) for _ in range(10)), (0, READY))

    async def test_memory_that_wavers_does_not(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = (size + up for up in range(0, 1 << 30, 4096) for size in (100 << 20, 90 << 20))
        monkeypatch.setattr(footprint, "measure", lambda pid: next(sizes))
        with pytest.raises(LoadTimeout, match="no progress"):
            await waited(clock, (6, at()))

    async def test_there_is_a_cap_that_nothing_moves(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout, match="not ready within 1800 s, the cap"):
            await waited(clock, *((6, at(number / 1000)) for number in range(1, 1000)))

    async def test_the_cap_is_the_models_own(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout, match="not ready within 20 s"):
            await waited(clock, *((6, at(number / 10)) for number in range(1, 10)), load_cap="20s")

    async def test_a_runner_that_never_answers(self, clock: Clock) -> None:
        with pytest.raises(LoadTimeout) as caught:
            await _unanswered(clock)
        assert "nothing answers yet" in caught.value.message
        assert caught.value.details["progress"] is None

    async def test_an_engine_that_knows_better_fails_it_at_once(self, clock: Clock) -> None:
        with pytest.raises(LoadFailed, match="the weights are damaged"):
            await waited(clock, (0, at()), (0, Finding(Verdict.FAILED, None, "the weights are damaged")))


class TestInterrupted:
    async def test_while_a_probe_waits_for_its_answer(self) -> None:
        asked = asyncio.Event()

        async def answer(exchange: Exchange) -> None:
            asked.set()
            await exchange.client_left()

        await self._interrupts(answer, asked)

    async def test_between_two_probes(self) -> None:
        asked = asyncio.Event()

        async def answer(exchange: Exchange) -> None:
            await exchange.send(LOADING)
            asked.set()

        await self._interrupts(answer, asked)

    async def _interrupts(self, answer: Callable[[Exchange], Awaitable[None]], asked: asyncio.Event) -> None:
        settings = model()
        process = FakeProcess(time.monotonic())
        interrupted = _never()
        async with serving(answer) as address, open_session(address, 5) as session:
            probe = Probe(settings, ENGINES["command"], address, session)
            waiting = asyncio.create_task(
                Readiness(settings, cast("Process", process), address, probe, 60).wait(interrupted)
            )
            await asked.wait()
            interrupted.set_result(None)
            with anyio.fail_after(LIMIT), pytest.raises(Interrupted):
                await waiting


class TestReadyByte:
    async def test_it_is_told(self) -> None:
        told = asyncio.Event()
        reader, writer = os.pipe()
        transport = await listen_for_ready_byte(reader, told.set)
        os.write(writer, b"1")
        with anyio.fail_after(LIMIT):
            await told.wait()
        transport.close()
        os.close(writer)

    async def test_an_end_without_a_byte_is_no_readiness(self) -> None:
        told = asyncio.Event()
        reader, writer = os.pipe()
        transport = await listen_for_ready_byte(reader, told.set)
        os.close(writer)
        with anyio.fail_after(LIMIT):
            while not transport.is_closing():
                await asyncio.sleep(0)
        assert not told.is_set()

    @pytest.mark.parametrize("turns", range(10))
    async def test_it_is_heard_whenever_it_comes(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch, turns: int
    ) -> None:
        """Also between the look at the runner and the wait for its next sign of life, which is long here."""
        monkeypatch.setattr(readiness_module, "pause", lambda elapsed: 5 * LIMIT)

        def prepare(readiness: Readiness, process: FakeProcess) -> None:
            loop = asyncio.get_running_loop()

            def ready() -> None:
                readiness.tell_ready()

            def later(left: int) -> None:
                loop.call_soon(later, left - 1) if left else ready()

            read_health = ScriptedEngine.read_health

            def read_and_begin(engine: ScriptedEngine, status: int, body: bytes) -> Finding:
                later(turns)
                return read_health(engine, status, body)

            monkeypatch.setattr(ScriptedEngine, "read_health", read_and_begin)

        await waited(clock, (0, at()), load_timeout=1e6, prepare=prepare, limit=3)


class TestStranger:
    async def test_who_answers_for_another_process_is_found_out(self, clock: Clock) -> None:
        """The server is this program; the runner is a child that does not listen at all."""
        async with child(python("print('up', flush=True); import signal; signal.pause()")) as it:
            await it.heard.line("up")
            with pytest.raises(StrangerListens):
                await waited(clock, (0, READY), unix=False, prepare=_belongs_to(it.process))

    async def test_unless_nobody_is_to_look(self, clock: Clock) -> None:
        async with child(python("print('up', flush=True); import signal; signal.pause()")) as it:
            await it.heard.line("up")
            await waited(clock, (0, READY), unix=False, check_listener=False, prepare=_belongs_to(it.process))

    async def test_who_listens_itself_is_ready(self, clock: Clock) -> None:
        await waited(clock, (0, at()), (0, READY), unix=False)


def _belongs_to(process: Process) -> Callable[[Readiness, FakeProcess], object]:
    def prepare(readiness: Readiness, fake: FakeProcess) -> None:
        fake.pid, fake.mark = process.pid, process.mark

    return prepare


class _Chatter(Activity):
    """A child that writes all the time."""

    async def wait(self, *_: Any, **__: Any) -> None:
        self.note()
        await asyncio.sleep(0)


async def _soon(result: str) -> str:
    await asyncio.sleep(0)
    return result


def _never() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


async def _unanswered(clock: Clock, **keys: Any) -> None:
    """Wait for a runner at whose port nobody listens; the time of each probe is told by its measuring of memory."""
    settings = model(**keys)
    process = FakeProcess(clock.now)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = Address(port=taken.getsockname()[1])

        class Passing(Activity):
            async def wait(self, *_: Any, **__: Any) -> None:
                clock.now += 3

        process.activity = Passing()
        async with open_session(address, 5) as session:
            probe = Probe(settings, ENGINES["command"], address, session)
            with anyio.fail_after(LIMIT):
                await Readiness(settings, cast("Process", process), address, probe, 10).wait(_never())
