"""Noticing a runner that lives and does nothing: probed while idle, given its time while it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

MISSES = 3
"""This many probes in a row without an answer make a runner suspect."""


class Pulse:
    """What is known of a runner's work, for telling a busy one from a wedged one. Times are monotonic.

    `users` hold a lease, `answering` counts open answers, `waiting` requests without a first chunk.
    """

    def __init__(self) -> None:
        self.users = 0
        self.waiting = 0
        self.answering = 0
        self.heard_at = time.monotonic()

    def beat(self) -> None:
        """Something came from the runner, or something was just asked of it."""
        self.heard_at = time.monotonic()


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How often a runner is probed, how long a probe may take, and how long work may be silent; in seconds."""

    interval: float
    first_chunk: float
    silence: float


async def wedged(pulse: Pulse, patience: Patience, answers: Callable[[], Awaitable[bool | None]]) -> str:
    """Return, with the reason in words, when the runner is wedged; may wait for ever.

    An idle runner is wedged after MISSES probes without an answer. One at work may be too busy to answer: it is wedged only
    if it has also been silent for as long as an answer may be, so a long prefill is left alone. What it missed at work is
    not held against it afterwards. A probe that could not be made, for which `answers` returns None, tells nothing.
    """
    misses = idle_misses = 0
    while True:
        await asyncio.sleep(until_next(patience.interval))
        began, idle = time.monotonic(), not pulse.users
        answered = await answers()
        if answered is None:
            continue
        misses = 0 if answered else misses + 1
        idle = idle and not pulse.users and pulse.heard_at <= began
        idle_misses = idle_misses + 1 if idle and not answered else 0
        if idle_misses >= MISSES:
            return f"it did not answer {idle_misses} probes of its health"
        if misses < MISSES or not pulse.users:
            continue
        silent = time.monotonic() - pulse.heard_at
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
