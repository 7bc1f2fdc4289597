"""On which devices a model can be, in equal parts on so many as it may spread over: the ways that are worth a look."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from mlxsup.scheduling.book import Book
from mlxsup.scheduling.ledger import SLOTS, Ledger

FEW = 256
"""So many ways on a number of devices are all looked at."""

Way = dict[str, int]
"""Bytes by device; where models are counted, the place that each takes, too."""

Room = Callable[[str], int]
"""Returns how many bytes there are on a device."""

Sorter = Callable[[Sequence[str], int], Sequence[str]]
"""Returns devices, of which each shall give so many bytes, in an order in which the first are a good choice."""


class Places:
    """Finds ways to place a model by a ledger; takes time that grows with the number of devices, not of their combinations."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def roomiest(self, book: Book, room: Room, by: Room) -> Iterator[Way]:
        """Yield the best way on each number of devices, few first: of those with `room` those with most `by` another measure.

        As all parts are equal, a way is as good as the worst of its devices, and this is the best of all combinations; of
        equal ones the first.
        """
        for count, part, enough in self._with_room(book, room):
            worst = min(sorted(map(by, enough), reverse=True)[:count], default=0)
            yield self._way([name for name in enough if by(name) >= worst][:count], part)

    def some(self, book: Book, room: Room, sort: Sorter) -> Iterator[Way]:
        """Yield ways on devices that have `room`, few first: all on a number of devices, while these are `FEW`.

        Else only those on devices that stand side by side when they are sorted, the best first.
        """
        for count, part, enough in self._with_room(book, room):
            chosen: Iterable[tuple[str, ...]]
            if math.comb(len(enough), count) <= FEW:
                chosen = itertools.combinations(enough, count)
            else:
                order = sort(enough, part)
                chosen = (
                    tuple(sorted(order[first : first + count], key=enough.index))
                    for first in range(len(order) - count + 1)
                )
            for devices in chosen:
                yield self._way(devices, part)

    def _with_room(self, book: Book, room: Room) -> Iterator[tuple[int, int, list[str]]]:
        """Yield each number of devices that has enough of them, with the part of each and those that have room for it."""
        accounts = self._ledger.accounts
        if SLOTS in accounts and room(SLOTS) < 1:
            return
        devices = [name for name in book.policy.devices if name in accounts]
        if not devices:
            yield 0, 0, []
        for count in range(1, min(book.policy.spread, len(devices)) + 1):
            part = -(-book.need // count)
            enough = [name for name in devices if part <= max(0, room(name))]
            if len(enough) >= count:
                yield count, part, enough

    def _way(self, devices: Iterable[str], part: int) -> Way:
        return self._ledger.known(dict.fromkeys(devices, part))
