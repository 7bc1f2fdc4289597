"""What an idle model is worth keeping by: the order in which models go when memory is needed.

The credit of a model is what GreedyDual-Size-Frequency reckons (Cherkasova, 1998; with uses left out it is Landlord, Young,
On-line file caching, 2002): the seconds that its reload takes, times how often it is used, for each GiB it holds; times a
factor for its priority and one for what is left of its keep-alive. How long a use counts is what such rules differ by: LRU
forgets at once, LFU never. Here a use counts half after so many uses of any model, as in LRFU (Lee et al., 2001), and how many is
found out: for each of some half-lives it is followed what a cache of the same size would have held and what reloads that had cost,
and the one that would have cost least of late decides (follow the leader among experts, as LeCaR does; Vietri et al., 2018).

Weights are kept as logarithms and grow with each use instead of fading, so that a key stays true in comparison until what is left
of the keep-alives is reckoned anew.
"""

from __future__ import annotations

import heapq
import math

from mlxsup.scheduling.eviction import Order, Worth

GIB = 1 << 30

HALF_LIVES = (8.0, 64.0, 512.0, 4096.0)
"""Uses of any model after which a use counts half."""
FADING = 0.5 ** (1 / 2000)
"""By so much a loss counts less with each use that follows."""
LEAD = 1.02
"""Another half-life must have lost so much less to take the lead."""
LONGEST = 3600.0
"""Who shall be kept for so long still, or for ever, has half as much credit again; of who has less time left it is a part."""
REVIEW = 60.0
"""Seconds after which that part is reckoned anew."""


class Shadow:
    """A cache that might have been: what one half-life would have kept, and what it would have cost."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.loss = 0.0
        self._weights: dict[str, float] = {}
        self._kept: dict[str, tuple[float, int]] = {}
        self._heap: list[tuple[float, str]] = []
        self._held = 0

    def use(self, model: str, uses: int, worth: Worth, value: float, capacity: int) -> None:
        """Count a use; `uses` is how many there were of all models, `value` the logarithm of what a use is worth."""
        now = uses / self.half_life
        before = self._weights.get(model)
        weight = now if before is None else max(before, now) + math.log2(1 + 2 ** (-abs(before - now)))
        self._weights[model] = weight
        self.loss *= FADING
        key = weight + value
        if model in self._kept:
            self._held -= self._kept[model][1]
        else:
            self.loss += worth.seconds
            heapq.heappush(self._heap, (key, model))
        self._kept[model] = (key, worth.size)
        self._held += worth.size
        if self._held > capacity:
            self._make_room(model, capacity)

    def weight(self, model: str) -> float:
        """Return the logarithm of a model's faded count; of one that was never used, what counts least."""
        return self._weights.get(model, 0.0)

    def forget(self, model: str) -> None:
        """Drop what is known of a model."""
        self._weights.pop(model, None)
        kept = self._kept.pop(model, None)
        if kept is not None:
            self._held -= kept[1]

    def _make_room(self, newcomer: str, capacity: int) -> None:
        stays: tuple[float, str] | None = None
        while self._held > capacity and self._heap:
            key, model = heapq.heappop(self._heap)
            kept = self._kept.get(model)
            if kept is None:
                continue
            if kept[0] > key:
                heapq.heappush(self._heap, (kept[0], model))
            elif model == newcomer:
                stays = (key, model)
            else:
                self._held -= self._kept.pop(model)[1]
        if stays is not None:
            heapq.heappush(self._heap, stays)


class Credit(Order):
    """The order that is used unless another is asked for."""

    def __init__(self) -> None:
        self._shadows = [Shadow(half_life) for half_life in HALF_LIVES]
        self._leader = self._shadows[1]
        self._uses = 0
        self._capacity = 0
        self._changes = 0

    def epoch(self, now: float) -> int:
        """Return another number when another half-life leads, and as the time goes that models shall still be kept."""
        return self._changes + int(now // REVIEW)

    def resize(self, capacity: int) -> None:
        """Let the shadows have as much memory as there is."""
        self._capacity = capacity

    def used(self, model: str, worth: Worth, now: float) -> None:
        """Count a use for each half-life, and see which of them leads."""
        del now
        self._uses += 1
        value = _value(worth)
        for shadow in self._shadows:
            shadow.use(model, self._uses, worth, value, self._capacity)
        best = min(self._shadows, key=lambda shadow: shadow.loss)
        if self._leader.loss > LEAD * best.loss:
            self._leader = best
            self._changes += 1

    def key(self, model: str, worth: Worth, now: float) -> float:
        """Return the logarithm of the credit."""
        del now
        return self._leader.weight(model) + _value(worth)

    def forget(self, model: str) -> None:
        """Drop what is known of a model."""
        for shadow in self._shadows:
            shadow.forget(model)

    def explain(self, model: str, worth: Worth) -> str:
        """Say how the credit came about."""
        half_life = self._leader.half_life
        uses = 2.0 ** (self._leader.weight(model) - self._uses / half_life)
        factor = 2.0 ** _value(worth) * max(1, worth.size) / GIB / worth.seconds
        credit = uses * worth.seconds * factor * GIB / max(1, worth.size)
        return (
            f"credit {credit:.3g} = reload {worth.seconds:.3g} s x {uses:.3g} uses x {factor:.3g}"
            f" / {max(worth.size, 1) / GIB:.3g} GiB (a use counts half after {half_life:.0f})"
        )


def _value(worth: Worth) -> float:
    """Return the logarithm of what one use of a model is worth."""
    stays = LONGEST if worth.keep_alive < 0 else min(worth.keep_alive, LONGEST)
    kept = 1 + stays / LONGEST / 2
    return math.log2(max(worth.seconds, 1e-3) * worth.weight * kept * GIB / max(worth.size, 1))
