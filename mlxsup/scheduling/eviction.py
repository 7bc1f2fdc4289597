"""Who goes when memory is needed: what an order of idle models is, and the smallest set of them that is enough."""

from __future__ import annotations

import abc
import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is worth keeping by.

    Attributes:
        seconds: what its reload takes.
        size: bytes that it holds, on all devices.
        weight: the factor of its priority.
        keep_alive: seconds that it shall still be kept if nobody uses it, negative for ever.
    """

    seconds: float
    size: int
    weight: float = 1.0
    keep_alive: float = 0.0


class Order(abc.ABC):
    """Says in which order idle models go: the lowest key first.

    A key holds for as long as the model is idle and `epoch` stays the same.
    """

    def epoch(self, now: float) -> int:
        """Return a number that is another one when keys must be made anew."""
        del now
        return 0

    @abc.abstractmethod
    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return the key of a model that is idle."""

    @abc.abstractmethod
    def explain(self, model: str, worth: Worth) -> str:
        """Return the sums behind a key in words."""

    def used(self, model: str, worth: Worth, now: float) -> None:  # noqa: B027 - not every order counts
        """Take note that the model was asked for and is used now."""

    def evicted(self, key: float) -> None:  # noqa: B027
        """Take note that models up to this key were put out."""

    def forget(self, model: str) -> None:  # noqa: B027
        """Drop what is known of a model that is no more."""

    def resize(self, capacity: int) -> None:  # noqa: B027
        """Take note of how many bytes there are for models, on all devices together."""


class Idle:
    """Models that are idle, in the order in which they go; of equals, the one that has been idle longest."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, str]] = []
        self._of: dict[str, tuple[float, int, str]] = {}
        self._count = 0

    def __contains__(self, model: str) -> bool:
        return model in self._of

    def __iter__(self) -> Iterator[str]:
        return (entry[2] for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, model: str, key: float) -> None:
        """Put a model in, or at another place."""
        self.remove(model)
        self._count += 1
        entry = self._of[model] = (key, self._count, model)
        bisect.insort(self._entries, entry)

    def remove(self, model: str) -> None:
        """Take a model out, if it is in."""
        entry = self._of.pop(model, None)
        if entry is not None:
            del self._entries[bisect.bisect_left(self._entries, entry)]

    def key(self, model: str) -> float:
        """Return a model's key."""
        return self._of[model][0]


Candidate = tuple[str, Mapping[str, int]]
"""A model, and what its going frees of each device."""


def choose(lacking: Mapping[str, int], candidates: Iterable[Candidate]) -> list[str] | None:
    """Choose who goes: a set that is enough and from which none can be spared; None when all together are not enough.

    Args:
        lacking: bytes that are needed of each device; what is not above 0 is not lacking.
        candidates: in the order in which they should go.
    """
    left = {device: size for device, size in lacking.items() if size > 0}
    taken: list[Candidate] = []
    for model, frees in candidates:
        if not left or all(size <= 0 for size in left.values()):
            break
        if any(size > 0 and frees.get(device, 0) > 0 for device, size in left.items()):
            taken.append((model, frees))
            for device in left:
                left[device] -= frees.get(device, 0)
    if any(size > 0 for size in left.values()):
        return None
    return _without_the_spared(taken, left)


def _without_the_spared(taken: Sequence[Candidate], left: dict[str, int]) -> list[str]:
    """Put back who is not needed after all, the most worthy first; `left` is what is lacking with all of them, 0 or less."""
    kept = []
    for model, frees in reversed(taken):
        if all(size + frees.get(device, 0) <= 0 for device, size in left.items()):
            for device in left:
                left[device] += frees.get(device, 0)
        else:
            kept.append(model)
    return kept[::-1]
