"""What is due when: one moment for each kind of thing and model, in a heap that is put right as its entries come to the top."""

from __future__ import annotations

import heapq
from typing import Literal

Kind = Literal["expires", "drain", "retry", "patience", "shortage", "residency", "look", "return"]
Key = tuple[Kind, str]


class Timers:
    """One moment by kind and model; to set it again costs nothing until the earlier moment has come."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._queued: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0

    def set(self, kind: Kind, model: str, at: float | None) -> None:
        """Let it come at that moment instead of any other; None is never."""
        key = (kind, model)
        if at is None:
            self._due.pop(key, None)
            return
        self._due[key] = at
        if self._queued.get(key, float("inf")) > at:
            self._push(key, at)

    def has(self, kind: Kind, model: str) -> bool:
        """Tell whether it will come at all."""
        return (kind, model) in self._due

    def next_at(self) -> float | None:
        """Return the earliest moment, None when there is none."""
        while self._heap:
            at, _, key = self._heap[0]
            due = self._due.get(key)
            if due == at:
                return at
            heapq.heappop(self._heap)
            if self._queued.get(key) == at:
                del self._queued[key]
                if due is not None:
                    self._push(key, due)
        return None

    def take_due(self, now: float) -> Key | None:
        """Take out one thing whose moment has come, None when there is none."""
        at = self.next_at()
        if at is None or at > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        self._queued.pop(key, None)
        return key

    def _push(self, key: Key, at: float) -> None:
        self._count += 1
        self._queued[key] = at
        heapq.heappush(self._heap, (at, self._count, key))
