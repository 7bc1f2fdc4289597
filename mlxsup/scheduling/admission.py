"""Whether a model can be loaded now, and whom that costs: looks at everything and changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import msgspec

from mlxsup.errors import DoesNotFit
from mlxsup.scheduling.book import Book, Limits, Policy
from mlxsup.scheduling.events import Weighed
from mlxsup.scheduling.eviction import Candidate, Idle, Order, choose
from mlxsup.scheduling.ledger import SLOTS, Account, Ledger, refusal
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


class Admission:
    """Makes plans, by the books, the ledger and the order of idle models, none of which it changes."""

    def __init__(self, books: Mapping[str, Book], ledger: Ledger, idle: Idle, order: Order, limits: Limits) -> None:
        self._books = books
        self._ledger = ledger
        self._idle = idle
        self._order = order
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
        ways = list(self._ways(book))
        fitting = [way for way in ways if self._fits(way, held)]
        if fitting:
            return Plan(verdict="fits", shares=min(fitting, key=self._tightness))
        waiting = [way for way in ways if self._fits_soon(way, held)]
        if waiting:
            return Plan(verdict="waits", shares=min(waiting, key=self._tightness))
        reachable = [way for way in ways if self._lack_at_best(way) is None]
        if not reachable:
            possible = [
                way for way in ways if all(need <= self._ledger.accounts[name].utmost for name, need in way.items())
            ]
            error = self._refusal(book, ways)
            return Plan(verdict="short" if possible else "refused", shares=(possible or ways)[0], error=error)
        if gentle:
            return Plan(verdict="blocked", shares=reachable[0])
        until: float | None = None
        found: list[tuple[float, tuple[str, ...], dict[str, int]]] = []
        for way in reachable:
            victims, until = self._victims(way, now, held, impatient=impatient)
            if victims is not None:
                cost = sum(self._books[name].worth(1, now).seconds for name in victims)
                found.append((cost, tuple(victims), way))
        if not found:
            return Plan(verdict="blocked", shares=reachable[0], until=until)
        _, chosen, way = min(found, key=lambda each: each[0])
        return Plan(verdict="evicts", shares=way, victims=chosen)

    def need(self, policy: Policy, weighed: Weighed) -> int:
        """Return what to reserve: what it needs, or all there is, where that is less than it needs, will never be more, and do."""
        ever = self._most(policy, lambda account: account.utmost)
        if ever is not None and 0 < weighed.least <= ever < weighed.need:
            return max(weighed.least, self.at_best(policy))
        return weighed.need

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

    def _ways(self, book: Book) -> Iterator[dict[str, int]]:
        """Yield the shares of each way to place it, on few devices first."""
        devices = [name for name in book.policy.devices if name in self._ledger.accounts]
        if not devices:
            yield self._ledger.known({})
            return
        for count in range(1, min(book.policy.spread, len(devices)) + 1):
            part = -(-book.need // count)
            for chosen in itertools.combinations(devices, count):
                yield self._ledger.known(dict.fromkeys(chosen, part))

    def _fits(self, way: Mapping[str, int], held: Mapping[str, int]) -> bool:
        accounts = self._ledger.accounts
        return self._fits_soon(way, held) and all(
            need <= max(0, accounts[name].available) for name, need in way.items()
        )

    def _fits_soon(self, way: Mapping[str, int], held: Mapping[str, int]) -> bool:
        accounts = self._ledger.accounts
        return all(need <= max(0, accounts[name].soon - held.get(name, 0)) for name, need in way.items())

    def _lack_at_best(self, way: Mapping[str, int]) -> str | None:
        """Name a device that is too small even if all went that may."""
        accounts = self._ledger.accounts
        return next((name for name, need in way.items() if need > max(0, accounts[name].reach)), None)

    def _tightness(self, way: Mapping[str, int]) -> tuple[int, int]:
        """Few devices first, then those with most room."""
        return len(way), -min((self._ledger.accounts[name].available for name in way if name != SLOTS), default=0)

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

    def _refusal(self, book: Book, ways: list[dict[str, int]]) -> DoesNotFit:
        """Say why it cannot be, by the way that comes nearest."""
        short = []
        for way in ways:
            name = self._lack_at_best(way)
            assert name is not None  # else it could be reached
            account = self._ledger.accounts[name]
            short.append((way[name] - account.reach, name, way[name], account))
        _, _, need, account = min(short, key=lambda each: each[:2])
        largest = account.device.total - account.kept
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
