"""Whether a model can be loaded now, and whom that costs: looks at everything and changes nothing."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from mlxsup.errors import DoesNotFit
from mlxsup.scheduling.book import Book, Limits, Policy
from mlxsup.scheduling.events import Weighed
from mlxsup.scheduling.eviction import Candidate, Idle, Order, choose
from mlxsup.scheduling.ledger import Account, Ledger, refusal
from mlxsup.scheduling.placing import Places, Room, Way
from mlxsup.sizes import rounded_size

STEADY = 0.95
"""The part of what other programs leave that is given out where it is all there is: they come and go."""

Verdict = Literal["fits", "waits", "evicts", "blocked", "short", "refused"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What would be done for a model.

    Attributes:
        verdict: it fits; it will when those who go are gone; when `victims` are put out; not before something happens that
            nobody can bring about; not before other programs give memory back; or not at all.
        shares: bytes by device.
        victims: idle ones stop, busy ones take no new work.
        until: when the first of the idle ones that came just now may be put out.
        error: why not, where it is short or refused.
    """

    verdict: Verdict
    shares: dict[str, int] = {}
    victims: tuple[str, ...] = ()
    until: float | None = None
    error: DoesNotFit | None = None


def _room_at_best(account: Account) -> int:
    return account.utmost if account.reach >= account.utmost else int(STEADY * account.reach)


def _largest(account: Account) -> int:
    """Return the most that any model could ever have of a device."""
    return account.device.total - account.kept


class Admission:
    """Makes plans, by the books, the ledger and the order of idle models, none of which it changes."""

    def __init__(self, books: Mapping[str, Book], ledger: Ledger, idle: Idle, order: Order, limits: Limits) -> None:
        self._books = books
        self._ledger = ledger
        self._idle = idle
        self._order = order
        self._places = Places(ledger)
        self.limits = limits

    def plan(
        self, book: Book, now: float, held: Mapping[str, int], *, gentle: bool = False, impatient: bool = False
    ) -> Plan:
        """Say what to do for a model that is not loaded.

        Args:
            book: the model.
            now: monotonic seconds.
            held: bytes by device that others have a right to first.
            gentle: nobody shall go for it.
            impatient: busy models may be asked to go, too.
        """
        accounts = self._ledger.accounts

        def soon(name: str) -> int:
            return accounts[name].soon - held.get(name, 0)

        def at_once(name: str) -> int:
            return min(accounts[name].available, soon(name))

        if (way := self._roomiest(book, at_once)) is not None:
            return Plan(verdict="fits", shares=way)
        if (way := self._roomiest(book, soon)) is not None:
            return Plan(verdict="waits", shares=way)
        reachable = self._reachable(book, now, held, impatient=impatient)
        if (first := next(reachable, None)) is None:
            return self._refusal(book)
        if gentle:
            ending = self._ending()
            way = self._roomiest(book, lambda name: soon(name) + ending[name])
            return Plan(verdict="blocked", shares=first) if way is None else Plan(verdict="waits", shares=way)
        until: float | None = None
        found: list[tuple[float, tuple[str, ...], Way]] = []
        for way in itertools.chain((first,), reachable):
            victims, until = self._victims(way, now, held, impatient=impatient)
            if victims is not None:
                found.append((self._cost(victims, now), tuple(victims), way))
        if not found:
            return Plan(verdict="blocked", shares=first, until=until)
        _, chosen, way = min(found, key=lambda each: each[0])
        return Plan(verdict="evicts", shares=way, victims=chosen)

    def need(self, policy: Policy, weighed: Weighed) -> int:
        """Return what to reserve: what it needs, or all there is, where that is less than it needs, will never be more, and do."""
        ever = self._most(policy, lambda account: account.utmost)
        if ever is not None and 0 < weighed.least <= ever < weighed.need:
            return max(weighed.least, self.at_best(policy))
        return weighed.need

    def makes_do(self, book: Book) -> bool:
        """Tell whether a model can be had, with less than it needs, in all that it can have."""
        return 0 < book.least <= self.at_best(book.policy) < book.need

    def at_best(self, policy: Policy) -> int:
        """Return all that a model can have if all others go that may; less a bit, where other programs come and go."""
        return self._most(policy, _room_at_best) or 0

    def _most(self, policy: Policy, room: Callable[[Account], int]) -> int | None:
        """Return the most that a model can have in equal parts on its devices, None where it is not counted."""
        accounts = self._ledger.accounts
        rooms = sorted((room(accounts[name]) for name in policy.devices if name in accounts), reverse=True)
        return max((each * count for count, each in enumerate(rooms[: policy.spread], 1)), default=None)

    def pressed(self, account: Account) -> list[str]:
        """Return who should go because a device is overdrawn: as many idle models as it takes, or all there are."""
        name, lacking = account.device.name, account.shortage
        victims = choose({name: lacking}, self._idle_candidates(None))
        if victims is None:
            return [model for model, frees in self._idle_candidates(None) if frees.get(name, 0)]
        return victims

    # Ways to place a model

    def _roomiest(self, book: Book, room: Room) -> Way | None:
        """Return the way on few devices that have `room`, and of these on those with most room now."""
        accounts = self._ledger.accounts
        return next(self._places.roomiest(book, room, lambda name: accounts[name].available), None)

    def _reachable(self, book: Book, now: float, held: Mapping[str, int], *, impatient: bool) -> Iterator[Way]:
        """Yield ways that there are if others go: all, or of very many those on the devices that are the cheapest to clear."""

        def by_cost(names: Sequence[str], part: int) -> Sequence[str]:
            costs = {}
            for name in names:
                victims, _ = self._victims({name: part}, now, held, impatient=impatient)
                costs[name] = math.inf if victims is None else self._cost(victims, now)
            return sorted(names, key=costs.__getitem__)

        return self._places.some(book, lambda name: self._ledger.accounts[name].reach, by_cost)

    def _ending(self) -> Counter[str]:
        """Return what those have, by device, who end their work and then go, for whatever reason."""
        found = Counter[str]()
        for name, holding in self._ledger.holdings.items():
            if self._books[name].state == "draining" and not holding.departing:
                found.update(self._ledger.counted(name))
        return found

    # Who goes

    def _victims(
        self, way: Mapping[str, int], now: float, held: Mapping[str, int], *, impatient: bool
    ) -> tuple[list[str] | None, float | None]:
        """Choose who goes, and say when more may."""
        accounts = self._ledger.accounts
        lacking = {name: need - (accounts[name].soon - held.get(name, 0)) for name, need in way.items()}
        victims = choose(lacking, self._idle_candidates(now))
        if victims is None and impatient:
            victims = choose(lacking, itertools.chain(self._idle_candidates(now), self._busy_candidates(now)))
        if victims is not None or not self.limits.min_residency:
            return victims, None
        some = self._ledger.holdings if impatient else self._idle
        young = [
            self._stays_until(book)
            for book in map(self._books.__getitem__, some)
            if book.state == "ready" and self._stays_until(book) > now and not book.policy.pinned
        ]
        return None, min(young, default=None)

    def _cost(self, victims: Iterable[str], now: float) -> float:
        """Return the seconds that it takes to load them again."""
        return sum(self._books[name].worth(1, now).seconds for name in victims)

    def _stays_until(self, book: Book) -> float:
        """Return when a model has resided long enough: one sum for all who ask, as a difference is rounded otherwise."""
        return book.ready_at + self.limits.min_residency

    def _idle_candidates(self, now: float | None) -> Iterator[Candidate]:
        """Yield the idle models that have resided long enough by `now`, all for None, in the order in which they go."""
        for name in self._idle:
            if now is None or self._stays_until(self._books[name]) <= now:
                yield name, self._ledger.counted(name)

    def _busy_candidates(self, now: float) -> Iterable[Candidate]:
        """Return those that have resided long enough, are in use and may go after that, the least worthy first."""
        found = []
        for name in self._ledger.holdings:
            book = self._books[name]
            may_go = book.state == "ready" and self._stays_until(book) <= now and not book.policy.pinned
            if may_go and book.leases:
                frees = self._ledger.counted(name)
                found.append((self._order.key(name, book.worth(sum(frees.values()), now), now), name, frees))
        return [(name, frees) for _, name, frees in sorted(found)]

    # Why not

    def _refusal(self, book: Book) -> Plan:
        """Say why it cannot be, by the way that comes nearest of those for which least would have to happen.

        That is first, that other programs give memory back; then, that pinned models go, too; then, a larger device.
        """
        accounts = self._ledger.accounts
        rooms: tuple[Room, ...] = (
            lambda name: accounts[name].reach,
            lambda name: accounts[name].utmost,
            lambda name: _largest(accounts[name]),
            lambda _: book.need,
        )
        for there, more in itertools.pairwise(rooms):
            left = [
                (*min((there(name) - need, name) for name, need in way.items()), way)
                for way in self._places.roomiest(book, more, there)
            ]
            if left:
                _, name, way = max(left, key=lambda each: each[0])
                verdict: Verdict = "short" if there is rooms[0] else "refused"
                return Plan(verdict=verdict, shares=way, error=self._error(book, way[name], accounts[name]))
        raise AssertionError("a device of any size is large enough")

    def _error(self, book: Book, need: int, account: Account) -> DoesNotFit:
        largest = _largest(account)
        source = f"its need is {book.source}" if book.source else ""
        if need > largest:
            error = refusal(account, need, largest, retry_after=None, why=source)
        else:
            pinned = f"{rounded_size(account.pinned)} are held by pinned models"
            who = pinned if need > largest - account.pinned else "other programs hold what is missing"
            why = f"{who}; {source}" if source else who
            error = refusal(account, need, account.reach, retry_after=self.limits.patience, why=why)
        error.details["model"] = book.name
        return error
