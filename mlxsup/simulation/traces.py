"""Loads to try a scheduler with: who is asked for when, made from a seed; and models of many sizes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

GIB: Final = 1 << 30
DAY: Final = 86400.0


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """A model: bytes that it needs, seconds of its load and of one answer."""

    name: str
    size: int
    load: float
    answer: float = 1.0


class Request(msgspec.Struct, frozen=True):
    """One request: seconds from the start, and the model's name."""

    at: float
    model: str


Catalogue = Sequence[Simulated]
Trace = Sequence[Request]


def equal_models(count: int, luck: random.Random) -> list[Simulated]:
    """Return models of one size, 1 GiB, that load in 5 s."""
    del luck
    return [Simulated(name=f"m{number:04}", size=GIB, load=5.0) for number in range(count)]


def mixed_models(count: int, luck: random.Random) -> list[Simulated]:
    """Return models from half a GiB to 32, whose loads take from a second to a minute and not only by their size."""
    made = []
    for number in range(count):
        size = 0.5 * 2 ** luck.uniform(0, 6)
        rate = 2 ** luck.uniform(-1.5, 1.5)
        made.append(Simulated(name=f"m{number:04}", size=int(size * GIB), load=1.0 + size / rate, answer=1.0))
    return made


def zipf(models: Catalogue, count: int, rate: float, luck: random.Random) -> Iterator[Request]:
    """Few models are asked for often, many seldom; each time independent of all before."""
    order = luck.sample(models, len(models))
    weights = list(itertools.accumulate(1 / (rank + 1) ** 0.9 for rank in range(len(order))))
    at = 0.0
    for _ in range(count):
        at += luck.expovariate(rate)
        yield Request(at, luck.choices(order, cum_weights=weights)[0].name)


def round_robin(models: Catalogue, count: int, rate: float, luck: random.Random) -> Iterator[Request]:
    """One after the other, and again from the first: what is put out is asked for soonest by whoever keeps the latest."""
    order, at = luck.sample(models, min(len(models), 40)), 0.0
    for number in range(count):
        at += luck.expovariate(rate)
        yield Request(at, order[number % len(order)].name)


def bursts(models: Catalogue, count: int, rate: float, luck: random.Random) -> Iterator[Request]:
    """Somebody works with one model for a while, then with another; a few at a time."""
    at, working = 0.0, [luck.choice(models) for _ in range(4)]
    for _ in range(count):
        at += luck.expovariate(rate)
        who = luck.randrange(len(working))
        if luck.random() < 0.05:
            working[who] = luck.choice(models)
        yield Request(at, working[who].name)


def working_day(models: Catalogue, count: int, rate: float, luck: random.Random) -> Iterator[Request]:
    """Busy at day and quiet at night, with other favourites in the morning, in the afternoon and at night."""
    favourites = [luck.sample(models, len(models)) for _ in range(3)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(models))))
    at = 0.0
    while count:
        at += luck.expovariate(rate * 2)
        hour = at % DAY / DAY * 24
        if luck.random() > 0.525 - 0.475 * math.cos(2 * math.pi * (hour - 2) / 24):
            continue
        count -= 1
        shift = 0 if 6 <= hour < 12 else 1 if 12 <= hour < 20 else 2
        yield Request(at, luck.choices(favourites[shift], cum_weights=weights)[0].name)


Maker = Callable[[Catalogue, int, float, random.Random], Iterator[Request]]
ModelMaker = Callable[[int, random.Random], list[Simulated]]

TRACES: Final[dict[str, tuple[ModelMaker, Maker]]] = {
    "zipf": (equal_models, zipf),
    "round-robin": (equal_models, round_robin),
    "bursts": (equal_models, bursts),
    "working-day": (equal_models, working_day),
    "mixed": (mixed_models, zipf),
}
"""The kinds of load, each with the models that go with it."""
