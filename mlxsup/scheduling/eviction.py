"""Who goes when memory is needed: the order of idle models, and the smallest set of them that is enough.

The order is GreedyDual-Size-Frequency (Cherkasova, 1998), the file caching of Young's Landlord (On-line file caching, 2002) with
counts of use: a model's credit is the seconds its reload costs, times how often it is asked for, for each GiB it holds. It is
reckoned when the model goes idle, on top of a level that rises to the credit of what was put out last, so that what is not
asked for sinks. Priority and keep-alive are part of the credit.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

GIB = 1 << 30


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is worth keeping by.

    Attributes:
        seconds: what its reload takes.
        size: bytes that it holds, on all devices.
        weight: the factor of its priority.
        keep_alive: seconds that it shall be kept after its last use, negative for ever.
    """

    seconds: float
    size: int
    weight: float = 1.0
    keep_alive: float = 0.0


class Order(Protocol):
    """Says in which order idle models go: the lowest key first. A key holds for as long as the model is idle."""

    def used(self, model: str, now: float) -> None:
        """Take note that the model was asked for."""

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return the key of a model that goes idle now."""

    def evicted(self, key: float) -> None:
        """Take note that models up to this key were put out."""

    def forget(self, model: str) -> None:
        """Drop what is known of a model that is no more."""

    def explain(self, model: str, worth: Worth) -> str:
        """Return the sums behind a key in words."""


class Credit:
    """The order that is used unless another is asked for."""

    HALF_LIFE = 3600.0
    """Seconds after which a use counts half."""

    def __init__(self) -> None:
        self._level = 0.0
        self._uses: dict[str, tuple[float, float]] = {}

    def used(self, model: str, now: float) -> None:
        """Count a use, earlier ones fading."""
        count, at = self._uses.get(model, (0.0, now))
        self._uses[model] = (1.0 + count * 0.5 ** ((now - at) / self.HALF_LIFE), now)

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return level plus credit."""
        del now
        return self._level + self._credit(model, worth)

    def evicted(self, key: float) -> None:
        """Raise the level."""
        self._level = max(self._level, key)

    def forget(self, model: str) -> None:
        """Drop its count."""
        self._uses.pop(model, None)

    def explain(self, model: str, worth: Worth) -> str:
        """Say how the credit came about."""
        uses = self._uses.get(model, (0.0, 0.0))[0]
        return (
            f"credit {self._credit(model, worth):.3g} = reload {worth.seconds:.3g} s x {uses:.3g} uses"
            f" x {worth.weight:g} / {max(worth.size, 1) / GIB:.3g} GiB"
        )

    def _credit(self, model: str, worth: Worth) -> float:
        uses = self._uses.get(model, (0.0, 0.0))[0]
        return max(uses, 0.1) * worth.seconds * worth.weight * GIB / max(worth.size, 1)


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
