"""What somebody who knows the future could do: seconds of loads, for requests that are served in a given order.

A model that a request is served by must be there, and never is more there than fits. So whoever serves requests in some order,
sooner or later and however many at once, does what one does who takes them one after the other in that order: `least` is a
bound for him, as long as it is asked of his own order.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

from mlxsup.simulation.traces import Simulated


def least(models: Iterable[Simulated], served: Sequence[str], capacity: int) -> float:
    """Return seconds of loads that nobody does with less of who serves requests for these models in this order.

    For models of one size and cost it is what can be had; else it may be too low to be had, never too high.
    """
    known = {model.name: model for model in models}
    kinds = {(known[name].size, known[name].load) for name in set(served)}
    if len(kinds) > 1:
        return _relaxed(known, served, capacity)
    return sum(seconds * _misses(served, max(1, capacity // size)) for size, seconds in kinds)


def farthest(models: Iterable[Simulated], served: Sequence[str], capacity: int) -> float:
    """Return the seconds of loads of one who puts out what is needed latest, weighed by its size and against its cost.

    It can be had, and is near the least that can: for models of one size and cost it is that.
    """
    known = {model.name: model for model in models}
    uses: dict[str, list[int]] = defaultdict(list)
    for index in range(len(served) - 1, -1, -1):
        uses[served[index]].append(index)
    kept: set[str] = set()
    held, cost = 0, 0.0
    for now, name in enumerate(served):
        uses[name].pop()
        if name in kept:
            continue
        model = known[name]
        cost += model.load
        held += model.size
        while held > capacity and kept:
            victim = max(kept, key=lambda other: _regret(known[other], uses[other], now))
            kept.discard(victim)
            held -= known[victim].size
        kept.add(name)
    return cost


def exact(models: Iterable[Simulated], served: Sequence[str], capacity: int) -> float:
    """Return the least seconds of loads there can be, by trying everything: for a handful of models only."""
    known = {model.name: model for model in models}
    best: dict[frozenset[str], float] = {frozenset(): 0.0}
    for name in served:
        after: dict[frozenset[str], float] = {}
        for kept, cost in best.items():
            loaded = kept | {name}
            paid = cost if name in kept else cost + known[name].load
            for count in range(len(loaded)):
                for gone in combinations(sorted(loaded - {name}), count):
                    left = loaded.difference(gone)
                    if sum(known[each].size for each in left) <= capacity and paid < after.get(left, math.inf):
                        after[left] = paid
        best = after
    return min(best.values(), default=math.inf)


def _misses(served: Sequence[str], places: int) -> int:
    """Return how many loads there must be at least: who puts out what is needed latest (Belady, 1966) has no more."""
    last: dict[str, int] = {}
    later = [0] * len(served)
    for index in range(len(served) - 1, -1, -1):
        later[index] = last.get(served[index], len(served))
        last[served[index]] = index
    needed: dict[str, int] = {}
    latest: list[tuple[int, str]] = []
    misses = 0
    for name, again in zip(served, later, strict=True):
        if name not in needed:
            misses += 1
            while len(needed) >= places:
                at, victim = heapq.heappop(latest)
                if needed.get(victim) == -at:
                    del needed[victim]
        needed[name] = again
        heapq.heappush(latest, (-again, name))
    return misses


def _relaxed(known: dict[str, Simulated], served: Sequence[str], capacity: int) -> float:
    """Let memory that is not needed now be used at another time, and a model be kept in part.

    Each use after the first saves a load, if the model is kept from the use before: that takes its size for as many requests
    as come in between. With such freedom the best is to begin with what saves most for that (Berger, Beckmann and
    Harchol-Balter, Practical bounds on optimal caching with variable object sizes, 2018).
    """
    paid = math.fsum(known[name].load for name in served)
    room = sum(capacity - known[name].size for name in served)
    last: dict[str, int] = {}
    kept: list[tuple[float, int, float]] = []
    for index, name in enumerate(served):
        if name in last:
            model = known[name]
            taken = model.size * (index - last[name] - 1)
            kept.append((taken / model.load if model.load else math.inf, taken, model.load))
        last[name] = index
    saved = []
    for _, taken, seconds in sorted(kept):
        if taken > room:
            saved.append(seconds * room / taken)
            break
        room -= taken
        saved.append(seconds)
    return paid - math.fsum(saved)


def _regret(model: Simulated, uses: list[int], now: int) -> float:
    """Return how good it is to put a model out: far off, large, quickly loaded."""
    return (uses[-1] - now) * model.size / model.load if uses else math.inf
