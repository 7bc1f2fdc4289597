"""When a model that failed may be started again: exponential backoff, and a breaker that opens when it fails again and again."""

from __future__ import annotations

from collections import deque

import msgspec


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait after failures; all but `failures` is seconds.

    Attributes:
        first: the wait after the first failure, doubled with each that follows.
        most: the longest wait.
        failures: so many within `window` open the breaker.
        window: see above.
        healthy: readiness of this length makes all earlier failures forgotten.
    """

    first: float = 0.5
    most: float = 30.0
    failures: int = 5
    window: float = 60.0
    healthy: float = 10.0


class Breaker:
    """The failures of one model.

    Closed: who asks waits until `retry_at`. Open: who asks is refused until then, and after that one probe at a time is let
    through, whose success closes it.
    """

    def __init__(self, rules: Backoff) -> None:
        self._rules = rules
        self._streak = 0
        self._recent: deque[float] = deque(maxlen=rules.failures)
        self._ready_at: float | None = None
        self.open = False
        self.retry_at = float("-inf")

    def ready(self, now: float) -> None:
        """Take note that the model works."""
        self._ready_at = now
        self.open = False

    def failed(self, now: float, jitter: float) -> None:
        """Take note of a failure; `jitter`, 0 to 1, takes up to a quarter off the wait."""
        if self._ready_at is not None and now - self._ready_at >= self._rules.healthy:
            self._streak = 0
            self._recent.clear()
        self._ready_at = None
        self._recent.append(now)
        wait = min(self._rules.most, self._rules.first * 2.0 ** min(self._streak, 64))
        self._streak += 1
        self.retry_at = now + wait * (1 - jitter / 4)
        full = len(self._recent) == self._rules.failures
        if full and now - self._recent[0] <= self._rules.window:
            self.open = True

    @property
    def streak(self) -> int:
        """Failures since it was last well."""
        return self._streak

    def forget(self) -> None:
        """Begin anew, as after a change of the configuration."""
        self._streak, self._ready_at = 0, None
        self._recent.clear()
        self.open, self.retry_at = False, float("-inf")
