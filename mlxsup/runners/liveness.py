"""Noticing a runner that lives and does nothing: probed while idle, given its time while it works."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import msgspec

MISSES = 3
"""This many probes in a row without an answer make a runner suspect."""


class Pulse:
    """What is known of a runner's work, for telling a busy one from a wedged one. Times are monotonic.

    `users` hold a lease, `answering` counts open answers, `waiting` requests without a first chunk, `listening` those who
    wait at this moment for something to come. `heard_at` is when something came, `asked_at` when somebody began to wait.
    """

    def __init__(self) -> None:
        self.users = 0
        self.waiting = 0
        self.answering = 0
        self.listening = 0
        self.heard_at = self.asked_at = time.monotonic()
        self._left_at = -math.inf
        self._owed = 0.0

    def beat(self) -> None:
        """Something came from the runner."""
        self.heard_at = time.monotonic()

    def ask(self) -> None:
        """Something is asked of the runner."""
        self.asked_at = time.monotonic()

    def leave(self, limit: float) -> None:
        """A caller goes before the end of its answer; it may take the runner `limit` seconds to notice.

        Of many who go while nothing comes, the first one's going counts, or a dead runner would never be found out.
        """
        if self._left_at < self.heard_at:
            self._left_at, self._owed = time.monotonic(), limit
        else:
            self._owed = max(self._owed, limit)

    @property
    def touched_at(self) -> float:
        """When something came, or was last waited for."""
        return max(self.heard_at, self.asked_at)

    @property
    def works_for_nobody(self) -> bool:
        """Whether it may be at work for a caller who has left: nothing has come since, and it is not long ago."""
        return self.heard_at <= self._left_at and time.monotonic() < self._left_at + self._owed


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How often a runner is probed, how long a probe may take, and how long work may be silent; in seconds."""

    interval: float
    first_chunk: float
    silence: float


async def wedged(pulse: Pulse, patience: Patience, answers: Callable[[], Awaitable[bool | None]]) -> str:
    """Return, with the reason in words, when the runner is wedged; may wait for ever.

    An idle runner is wedged after MISSES probes without an answer. One at work may be too busy to answer: it is wedged only
    if it has also been silent for as long as an answer may be, so a long prefill is left alone, also when its caller has
    left. It is not silent while nobody listens: who reads slowly makes it wait. What it missed at work is not held against it
    afterwards. A probe that could not be made, for which `answers` returns None, tells nothing.
    """
    misses = idle_misses = 0
    while True:
        await asyncio.sleep(until_next(patience.interval))
        began, idle = time.monotonic(), not pulse.users
        answered = await answers()
        if answered is None:
            continue
        if answered:
            pulse.beat()
        misses = 0 if answered else misses + 1
        idle = idle and not pulse.users and pulse.touched_at <= began
        idle_misses = idle_misses + 1 if idle and not answered else 0
        if idle_misses >= MISSES and not pulse.works_for_nobody:
            return f"it did not answer {idle_misses} probes of its health"
        if misses < MISSES or not pulse.users or (pulse.answering and not pulse.listening):
            continue
        silent = time.monotonic() - pulse.touched_at
        patient = pulse.waiting or not pulse.answering  # who holds a lease without an answer asks in its own way
        if silent > (patience.first_chunk if patient else patience.silence):
            return f"it did not answer {misses} probes of its health and has been silent for {silent:.0f} s"


def until_next(interval: float) -> float:
    """Return the seconds until the next multiple of `interval`, or the one after it if that is less than half of one away.

    A loop may wake a little early, and that must not make two probes of one.
    So all are probed in the same moment: a machine at rest is woken once for them, not once for each.
    """
    rest = interval - time.monotonic() % interval
    return rest if rest > interval / 2 else rest + interval
