"""A runner that lives and does nothing is found out; one that works hard and says little is left alone."""

from __future__ import annotations

import asyncio
import itertools

import anyio
import pytest

from mlxsup.runners import liveness
from mlxsup.runners.liveness import MISSES, Patience, Pulse, wedged
from tests.waiting import LIMIT

QUICK = Patience(interval=0.001, first_chunk=600, silence=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(liveness, "time", found)
    return found


class Probes:
    """Answers as it is told; the last answer is given for ever, each probe takes so many seconds of the clock."""

    def __init__(self, clock: Clock, *answers: bool | None, seconds: float = 2) -> None:
        self.asked = 0
        self._clock = clock
        self._seconds = seconds
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.reached = asyncio.Event()
        self.limit = 50

    async def __call__(self) -> bool | None:
        self.asked += 1
        self._clock.now += self._seconds
        if self.asked >= self.limit:
            self.reached.set()
        return next(self._answers)


async def reason(pulse: Pulse, probes: Probes, patience: Patience = QUICK) -> str:
    with anyio.fail_after(LIMIT):
        return await wedged(pulse, patience, probes)


async def left_alone(pulse: Pulse, probes: Probes, patience: Patience = QUICK) -> bool:
    """Whether nothing is found in fifty probes."""
    watching = asyncio.create_task(wedged(pulse, patience, probes))
    reached = asyncio.create_task(probes.reached.wait())
    with anyio.fail_after(LIMIT):
        await asyncio.wait({watching, reached}, return_when=asyncio.FIRST_COMPLETED)
    found = not watching.done()
    for task in (watching, reached):
        task.cancel()
    await asyncio.wait({watching, reached})
    return found


async def test_an_idle_one_after_three_probes_without_an_answer(clock: Clock) -> None:
    probes = Probes(clock, True, True, False)
    assert "3 probes" in await reason(Pulse(), probes)
    assert probes.asked == 2 + MISSES == 5


async def test_they_must_be_in_a_row(clock: Clock) -> None:
    assert await left_alone(Pulse(), Probes(clock, *([False, False, True] * 20)))


async def test_one_that_answers_is_left_alone(clock: Clock) -> None:
    assert await left_alone(Pulse(), Probes(clock, True))


async def test_one_at_work_is_given_as_long_as_an_answer_may_be_silent(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = pulse.answering = pulse.listening = 1
    probes = Probes(clock, False, seconds=2)
    assert "silent for 62 s" in await reason(pulse, probes)
    assert probes.asked == 31


async def test_who_holds_a_lease_for_requests_of_his_own_is_given_as_long_as_a_first_chunk(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = 1
    assert "silent for 602 s" in await reason(pulse, Probes(clock, False, seconds=2))


async def test_a_long_prefill_is_left_alone(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = pulse.waiting = 1
    assert await left_alone(pulse, Probes(clock, False, seconds=10))  # 500 s in all


async def test_but_not_longer_than_its_first_chunk_may_take(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = pulse.waiting = 1
    assert await reason(pulse, Probes(clock, False, seconds=50))
    assert clock.now - 1000 >= 600


async def test_its_silence_begins_after_the_last_probe_that_it_answered(clock: Clock) -> None:
    """Who holds a lease for hours may ask it for something late."""
    pulse = Pulse()
    pulse.users = 1
    probes = Probes(clock, *[True] * 400, False, seconds=2)  # it answers for 800 s
    assert "silent for 602 s" in await reason(pulse, probes)
    assert clock.now - 1000 == 800 + 602


async def test_one_whose_reader_takes_nothing_is_left_alone(clock: Clock) -> None:
    """It waits within a write, and the reader is the silent one."""
    pulse = Pulse()
    pulse.users = pulse.answering = 1
    assert await left_alone(pulse, Probes(clock, False, seconds=50))


async def test_one_that_is_silent_once_its_reader_listens_again_is_found_out(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = pulse.answering = 1

    class SlowReader(Probes):
        async def __call__(self) -> bool | None:
            answered = await super().__call__()
            if self.asked == 20:
                pulse.listening = 1
                pulse.ask()
            return answered

    assert "silent for 100 s" in await reason(pulse, SlowReader(clock, False, seconds=50))
    assert clock.now - 1000 == 1100


async def test_one_that_may_still_work_for_a_caller_who_left_is_left_alone(clock: Clock) -> None:
    pulse = Pulse()
    pulse.leave(600)
    assert await left_alone(pulse, Probes(clock, False, seconds=10))  # 500 s in all


async def test_but_not_longer_than_that_may_take_it(clock: Clock) -> None:
    pulse = Pulse()
    pulse.leave(60)
    assert "did not answer 30 probes" in await reason(pulse, Probes(clock, False, seconds=2))
    assert clock.now - 1000 == 60


async def test_one_that_has_answered_since_is_an_idle_one(clock: Clock) -> None:
    pulse = Pulse()
    pulse.leave(600)
    probes = Probes(clock, False, False, True, False, seconds=2)
    assert "3 probes" in await reason(pulse, probes)
    assert probes.asked == 3 + MISSES


async def test_callers_who_lose_patience_one_after_the_other_do_not_hide_a_dead_one(clock: Clock) -> None:
    pulse = Pulse()

    class Impatient(Probes):
        async def __call__(self) -> bool | None:
            pulse.leave(60)
            return await super().__call__()

    assert await reason(pulse, Impatient(clock, False, seconds=2))
    assert 60 <= clock.now - 1000 <= 62


async def test_of_callers_who_left_the_one_that_was_to_wait_longest_counts(clock: Clock) -> None:
    pulse = Pulse()
    pulse.leave(60)
    pulse.leave(600)
    pulse.leave(5)
    assert await reason(pulse, Probes(clock, False, seconds=10))
    assert clock.now - 1000 == 600


async def test_one_that_sends_something_is_left_alone_though_it_answers_no_probe(clock: Clock) -> None:
    pulse = Pulse()
    pulse.users = pulse.answering = pulse.listening = 1

    class Busy(Probes):
        async def __call__(self) -> bool | None:
            pulse.beat()
            return await super().__call__()

    assert await left_alone(pulse, Busy(clock, False, seconds=50))


async def test_probes_go_on_while_it_is_suspect(clock: Clock) -> None:
    """What is silent and misses probes may come back."""
    pulse = Pulse()
    pulse.users = pulse.answering = pulse.listening = 1
    answers = [False] * 20 + [True]
    assert await left_alone(pulse, Probes(clock, *answers, seconds=2.5))


async def test_probes_that_could_not_be_made_tell_nothing(clock: Clock) -> None:
    assert await left_alone(Pulse(), Probes(clock, None))


async def test_they_do_not_hide_those_that_were_missed(clock: Clock) -> None:
    probes = Probes(clock, False, None, False, None, False)
    assert "3 probes" in await reason(Pulse(), probes)
    assert probes.asked == 5


class Working(Probes):
    """Is at work for so many probes, the last of which sees the end of it; answers none until then, and some later."""

    def __init__(self, clock: Clock, pulse: Pulse, work: int, *answers: bool) -> None:
        super().__init__(clock, *[False] * work, *answers)
        self._pulse = pulse
        self._work = work
        pulse.users = pulse.answering = 1

    async def __call__(self) -> bool | None:
        answered = await super().__call__()
        if self.asked == self._work:
            self._pulse.users = self._pulse.answering = 0
        return answered


async def test_what_was_missed_at_work_is_not_held_against_it_afterwards(clock: Clock) -> None:
    """It tidies up after a long answer."""
    pulse = Pulse()
    assert await left_alone(pulse, Working(clock, pulse, 8, False, False, True))


async def test_one_that_stays_silent_after_its_work_is_found_out(clock: Clock) -> None:
    pulse = Pulse()
    probes = Working(clock, pulse, 8, False)
    assert "3 probes" in await reason(pulse, probes)
    assert probes.asked == 8 + MISSES


async def test_a_probe_during_which_it_worked_tells_nothing_of_one_that_idles(clock: Clock) -> None:
    """A short request came and went between two looks."""
    pulse = Pulse()

    class Brief(Probes):
        async def __call__(self) -> bool | None:
            answered = await super().__call__()
            pulse.beat()
            return answered

    assert await left_alone(pulse, Brief(clock, False))
