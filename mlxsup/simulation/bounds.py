"""What could be had by somebody who knows the future: seconds of loads that a load of requests costs at least.

Requests are taken one after the other, as if answers and loads took no time; a model that is asked for must be there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

from mlxsup.simulation.traces import Request, Simulated


def farthest(models: Iterable[Simulated], trace: Iterable[Request], capacity: int) -> float:
    """Return the seconds of loads of one who puts out what is needed latest, weighed by its size and against its cost.

    For models of one size and cost that is Belady's rule and the least there can be; else it is near it, and `exact` tells.
    """
    known = {model.name: model for model in models}
    asked = [request.model for request in trace]
    uses: dict[str, list[int]] = defaultdict(list)
    for index in range(len(asked) - 1, -1, -1):
        uses[asked[index]].append(index)
    kept: set[str] = set()
    held, cost = 0, 0.0
    for now, name in enumerate(asked):
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


def exact(models: Iterable[Simulated], trace: Iterable[Request], capacity: int) -> float:
    """Return the least seconds of loads there can be, by trying everything: for a handful of models only."""
    known = {model.name: model for model in models}
    best: dict[frozenset[str], float] = {frozenset(): 0.0}
    for request in trace:
        after: dict[frozenset[str], float] = {}
        for kept, cost in best.items():
            loaded = kept | {request.model}
            paid = cost if request.model in kept else cost + known[request.model].load
            for count in range(len(loaded)):
                for gone in combinations(sorted(loaded - {request.model}), count):
                    left = loaded.difference(gone)
                    if sum(known[name].size for name in left) <= capacity and paid < after.get(left, math.inf):
                        after[left] = paid
        best = after
    return min(best.values(), default=math.inf)


def _regret(model: Simulated, uses: list[int], now: int) -> float:
    """Return how good it is to put a model out: far off, large, quickly loaded."""
    return (uses[-1] - now) * model.size / model.load if uses else math.inf
