"""What would become of a request: a copy of the scheduler gets one, and what it does is put into words."""

from __future__ import annotations

import io
import pickle
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Self

import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling import wording
from mlxsup.scheduling.admission import Plan
from mlxsup.scheduling.book import Book, Claim
from mlxsup.scheduling.eviction import Order, Worth
from mlxsup.scheduling.wishes import Wishes

NOBODY = -1
"""The ticket of a request that nobody makes."""


class Outlook(Wishes, ABC):
    """Looks ahead."""

    @abstractmethod
    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Take one event and return what is to be done about it, in order."""

    def wake_at(self) -> float | None:
        """Return when a Tick is due next, None for never."""
        return self._timers.next_at()

    def explain(self, name: str, now: float, weighed: ev.Weighed | ev.Unfit | None = None) -> str:
        """Say what would happen if the model were asked for now, and why; changes nothing.

        `weighed` is what it needs, if that was looked at just now; else it is what it was found to need the last time.
        """
        return self._glimpse(name).foretell(name, now, weighed)

    def foretell(self, name: str, now: float, weighed: ev.Weighed | ev.Unfit | None = None) -> str:
        """Ask for a model and say what comes of it, as `explain` does. It is really asked for: this is what copies are for."""
        self._now = now
        book = self._books[name]
        sums = {each: self._sums(each) for each, its in self._books.items() if its.state == "ready"}
        effects = list(self.handle(ev.Acquire(NOBODY, name), now))
        if book.claim is not None and not book.claim.weighed:
            found = weighed or ev.Weighed(name, 0, book.need, source=book.source)
            effects += self.handle(msgspec.structs.replace(found, attempt=book.attempt), now)
        for effect in effects:
            match effect:
                case fx.Grant(ticket=ticket) if ticket == NOBODY:
                    return "granted at once: it is ready"
                case fx.Reject(ticket=ticket, error=error) if ticket == NOBODY:
                    return f"refused: {error.message}"
                case fx.Spawn(model=model) if model == name:
                    reserved = self.ledger.holdings[name].reserved
                    self.ledger.release(name, now)  # so that the figures are those of before
                    why = wording.room(book, reserved, self.ledger)
                    return f"loaded at once: {why}" if why else "loaded at once"
        if book.claim is None:
            return wording.joins(book, now)
        return self._waits(book, book.claim, sums)

    def _waits(self, book: Book, claim: Claim, ready: Mapping[str, str]) -> str:
        """Say for what a claim waits."""
        before = self._held_before(book, claim)
        held = _sum(before.values())
        plan = self._admission.plan(book, self._now, held, impatient=claim.impatient)
        if plan.error is not None:
            return self._endures(book, claim, plan.error, ready)
        why = wording.room(book, plan.shares, self.ledger)
        if victims := self._went_for(book, ready):
            return wording.after(victims, why)
        alone = self._admission.plan(book, self._now, {}, impatient=claim.impatient)
        if alone.verdict != plan.verdict:
            return wording.behind([each for each, holds in before.items() if holds.keys() & alone.shares.keys()], why)
        if plan.verdict == "waits":
            going = [
                each
                for each, holding in self.ledger.holdings.items()
                if holding.departing and any(holding.counted(device) for device in plan.shares)
            ]
            return wording.when_gone(going, [each for each in going if self._is_wanted(self._books[each])], why)
        busy = self._in_the_way(plan, held)
        if plan.until is not None:
            now = self._now
            while not victims and (due := self.wake_at()) is not None and due <= plan.until:
                self.handle(ev.Tick(), max(now, due))
                victims = self._went_for(book, ready)
            if victims and self._now == plan.until:  # else they are in use, and it has waited for long enough by then
                return wording.when_old_enough(list(victims), plan.until - now, self._limits.min_residency, why)
        return wording.blocked(busy, why)

    def _endures(self, book: Book, claim: Claim, error: MlxsupError, ready: Mapping[str, str]) -> str:
        """Say what becomes of a claim on memory that other programs hold, if they keep it."""
        end = claim.short_until
        if end is None or end <= self._now or not self._admission.makes_do(book):
            return f"queued for a moment, then refused: {error.message}"
        wait, effects = end - self._now, list[fx.Effect]()
        while claim.short_until is not None and (due := self.wake_at()) is not None and due <= end:
            effects += self.handle(ev.Tick(), max(self._now, due))
        if book.claim is not claim:
            loaded = any(isinstance(effect, fx.Spawn) and effect.model == book.name for effect in effects)
            then = "loaded" if loaded else "refused"
        else:
            then = self._waits(book, claim, ready)
        return wording.makes_do(wait, then, book.need, error.message)

    def _held_before(self, book: Book, claim: Claim) -> dict[str, Mapping[str, int]]:
        """Return to what those have a right who come before a claim."""
        found: dict[str, Mapping[str, int]] = {}
        for _, _, name in self._claims[: self._claims.index(claim.place(book.name))]:
            other = self._books[name]
            if other.claim is not None and other.claim.weighed and not other.claim.gentle:
                impatient = other.claim.impatient
                plan = self._admission.plan(other, self._now, _sum(found.values()), impatient=impatient)
                if plan.verdict in {"waits", "evicts"} or (plan.verdict == "blocked" and impatient):
                    found[name] = plan.shares
        return found

    def _went_for(self, book: Book, ready: Mapping[str, str]) -> dict[str, str]:
        """Return who of those that were `ready` is put out for a model, with what is said of it there."""
        victims = book.claim.victims if book.claim is not None else ()
        return {each: ready[each] for each in victims if each in ready and self._books[each].state != "ready"}

    @staticmethod
    def _is_wanted(book: Book) -> bool:
        """Tell whether a model that goes will ask for memory again as soon as it is gone."""
        unasked = book.then == "renew" or (book.then == "return" and book.policy.pinned)
        return bool(book.waiting or book.loading or unasked)

    def _in_the_way(self, plan: Plan, held: Mapping[str, int]) -> dict[str, str]:
        """Return who has what a plan lacks, and cannot be put out, with the reason."""
        accounts = self.ledger.accounts
        lacking = [name for name, need in plan.shares.items() if need > accounts[name].soon - held.get(name, 0)]
        return {
            name: wording.cannot_go(self._books[name])
            for name, holding in self.ledger.holdings.items()
            if not holding.departing and any(holding.counted(device) for device in lacking)
        }

    def _glimpse(self, name: str) -> Self:
        """Return a copy to ask for this model; what a look ahead does not change is shared, for a whole one takes its time."""
        shared: dict[int, object] = {id(self.order): _Unmoved(self.order)}
        for other, book in self._books.items():
            at_rest = book.claim is None and book.state in ("stopped", "failed") and other not in self._returning
            if at_rest and other != name:
                shared[id(book)] = book
        whole = io.BytesIO()
        _Shortener(whole, shared).dump(self)
        whole.seek(0)
        made: Self = _Restorer(whole, shared).load()
        return made


def _sum(shares: Iterable[Mapping[str, int]]) -> Counter[str]:
    found = Counter[str]()
    for each in shares:
        found.update(each)
    return found


class _Shortener(pickle.Pickler):
    """Leaves out what is shared."""

    def __init__(self, file: io.BytesIO, shared: Mapping[int, object]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._shared = shared

    def persistent_id(self, obj: object) -> int | None:
        """Return what a shared thing is known by, None for all others."""
        return id(obj) if id(obj) in self._shared else None


class _Restorer(pickle.Unpickler):
    """Puts in what is shared."""

    def __init__(self, file: io.BytesIO, shared: Mapping[int, object]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: int) -> object:
        """Return what is known by that."""
        return self._shared[pid]


class _Unmoved(Order):
    """Another order, which learns nothing by this one."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def epoch(self, now: float) -> int:
        return self._order.epoch(now)

    def key(self, model: str, worth: Worth, now: float) -> float:
        return self._order.key(model, worth, now)

    def explain(self, model: str, worth: Worth) -> str:
        return self._order.explain(model, worth)
