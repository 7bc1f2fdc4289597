"""Other orders in which idle models could go, as other systems have them, to compare with ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mlxsup.scheduling.credit import Credit
from mlxsup.scheduling.eviction import Order, Worth


class LeastRecentlyUsed(Order):
    """Who has been idle longest goes first."""

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return the time."""
        del model, worth
        return now

    def explain(self, model: str, worth: Worth) -> str:
        """Say what is known."""
        del worth
        return f"{model} has been idle longest"


class KeepAliveOrder(LeastRecentlyUsed):
    """Who would go first for being idle goes first, as in Ollama."""

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return when its keep-alive ends; of those that stay for ever, all after."""
        del model
        return now + worth.keep_alive if worth.keep_alive >= 0 else float("inf")


class PlainGreedyDual(Order):
    """GreedyDual-Size-Frequency as it was published: what is put out is forgotten, and no use fades."""

    def __init__(self) -> None:
        self._level = 0.0
        self._uses: dict[str, int] = {}
        self._keys: dict[str, float] = {}

    def used(self, model: str, worth: Worth, now: float) -> None:
        """Count a use."""
        del worth, now
        self._uses[model] = self._uses.get(model, 0) + 1

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return level plus uses times cost by size."""
        del now
        self._keys[model] = self._level + self._uses.get(model, 1) * worth.seconds * (1 << 30) / max(1, worth.size)
        return self._keys[model]

    def evicted(self, key: float) -> None:
        """Raise the level, and forget who is below it."""
        self._level = max(self._level, key)
        for model in [model for model, its in self._keys.items() if its <= key]:
            del self._keys[model]
            self._uses.pop(model, None)

    def forget(self, model: str) -> None:
        """Drop its count."""
        self._uses.pop(model, None)
        self._keys.pop(model, None)

    def explain(self, model: str, worth: Worth) -> str:
        """Say what is known."""
        del worth
        return f"{model} was used {self._uses.get(model, 0)} times"


class Rival:
    """A way to choose who goes; `by_count` bounds how many are loaded instead of how much they hold."""

    def __init__(self, order: Callable[[], Order], *, by_count: bool = False) -> None:
        self.order = order
        self.by_count = by_count


OURS: Final = "credit"
RIVALS: Final[dict[str, Rival]] = {
    OURS: Rival(Credit),
    "LRU by count": Rival(LeastRecentlyUsed, by_count=True),
    "LRU by bytes": Rival(LeastRecentlyUsed),
    "keep-alive order": Rival(KeepAliveOrder),
    "plain GDSF": Rival(PlainGreedyDual),
}
"""Ours first."""
