"""An alarm for waits that last too long, of which there are many and hardly any does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final

_TICK: Final = 0.001
"""Seconds; the timers of a loop are no finer."""


class Alarm:
    """Calls `ring` when a wait lasts too long. One timer serves many waits: each costs no more than to note when it is due."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf
        self._due = math.inf

    def set(self, due: float) -> None:
        """Begin a wait that lasts too long at `due`, in time of the monotonic clock; it takes the place of the one before."""
        self._due = due
        if due < self._looks_at:
            self._look_later()

    def hush(self) -> None:
        """End the wait."""
        self._due = math.inf

    def cancel(self) -> None:
        """End the wait, and hold on to nothing."""
        self._due = self._looks_at = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = self._due
        self._timer = self._loop.call_later(max(_TICK, self._due - time.monotonic()), self._look)

    def _look(self) -> None:
        due = self._due
        if due <= time.monotonic():
            self.cancel()
            self._ring()
        elif due < math.inf:
            self._look_later()
        else:
            self.cancel()
