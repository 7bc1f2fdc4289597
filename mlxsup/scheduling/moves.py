"""What can be done with a model, step by step: claim, admit, grant, let rest, put out, refuse. When, is the scheduler's to say."""

from __future__ import annotations

import bisect
import copy
import pickle
from collections.abc import Iterable, Mapping
from typing import Self

from mlxsup.errors import MlxsupError
from mlxsup.report import State
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import wording
from mlxsup.scheduling.admission import Admission, Plan
from mlxsup.scheduling.book import HEAD_START, Book, Claim, Limits, Policy
from mlxsup.scheduling.credit import Credit
from mlxsup.scheduling.eviction import Idle, Order
from mlxsup.scheduling.ledger import SLOTS, Device, Ledger
from mlxsup.scheduling.timers import Timers

DEFAULTS = Limits()


class Moves:
    """All that is known, and the steps that change it; each keeps books, ledger, idle models and timers in line."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        queue: int,
        limits: Limits = DEFAULTS,
        devices: Iterable[Device] = (),
        order: Order | None = None,
    ) -> None:
        self._books = {name: Book(name, policy, limits.backoff) for name, policy in policies.items()}
        self._queue = queue
        self._limits = limits
        self.ledger = Ledger(devices, limits.max_loaded)
        self.order: Order = Credit() if order is None else order
        self._idle = Idle()
        self._claims: list[tuple[int, float, str]] = []
        self._returning: dict[str, int] = {}
        """Who is loaded as soon as there is room, though nobody asks for it, and how many bytes it held when it went."""
        self._making_room: dict[str, None] = {}
        """Who is in use and takes no new work, as its memory is needed."""
        self._timers = Timers()
        self._waiting = 0
        """Of all models: requests for a place and for a load."""
        self._live = 0
        self._out: list[fx.Effect] = []
        self._now = 0.0
        self._reconsider = False
        self._epoch = 0
        self.closing = False
        self._closed = False
        self._make_admission()

    def _make_admission(self) -> None:
        self.order.resize(self.ledger.capacity)
        self._admission = Admission(self._books, self.ledger, self._idle, self.order, self._limits)

    def copy(self) -> Self:
        """Return one that goes its own way from here, for tests and for looking ahead."""
        made: Self = pickle.loads(pickle.dumps(self, pickle.HIGHEST_PROTOCOL))  # noqa: S301 - a tenth of deepcopy's time
        return made

    # Claims

    def _want(self, book: Book, reason: str, *, gentle: bool = False) -> None:
        """See to it that the model will be ready, unless it is on its way up, or on its way down first."""
        if book.live or self.closing:
            return
        wished = book.claim is not None
        if book.claim is not None:
            if book.claim.gentle and not gentle:
                self._drop_claim(book)  # now somebody waits for it: it has another rank, and may cost
            else:
                return
        if book.breaker.retry_at > self._now:
            if book.state != "backoff":
                self._change(book, "backoff", wording.waits_to_retry(book, self._now))
            self._timers.set("retry", book.name, book.breaker.retry_at)
            return
        rank = book.first_rank(self._now)
        book.claim = Claim(rank, reason, gentle=gentle, weighed=False)
        book.claim.wished = wished
        bisect.insort(self._claims, book.claim.place(book.name))
        if not (gentle and book.policy.memory is not None):
            self._timers.set("patience", book.name, self._now + self._limits.patience)
        self._weigh(book, book.claim)

    def _weigh(self, book: Book, claim: Claim) -> None:
        """Find out what a claim is for, by the policy if that says it."""
        claim.weighed = book.policy.memory is not None
        book.attempt += 1
        if book.policy.memory is not None:
            book.need, book.least, book.source = book.policy.memory, 0, ""
            self._reconsider = True
        else:
            self._out.append(fx.Weigh(book.name, book.attempt))

    def _drop_claim(self, book: Book) -> None:
        """Give up a model's claim, if it has one."""
        claim, book.claim = book.claim, None
        if claim is not None:
            del self._claims[bisect.bisect_left(self._claims, claim.place(book.name))]
            self._timers.set("patience", book.name, None)
            self._timers.set("shortage", book.name, None)
            self._reconsider = bool(self._claims or self._returning or self._making_room)

    def _drop_if_unwanted(self, book: Book) -> None:
        """Where the last who waited has left, nothing is done for it any more; a load under way goes on."""
        if book.waiting or book.loading or book.policy.pinned:
            return
        claim = book.claim
        if claim is not None and not claim.gentle:
            self._drop_claim(book)
            if claim.wished and book.policy.preload:
                self._want(book, "preloaded", gentle=True)
        if book.state == "backoff" and book.name not in self._returning:
            self._timers.set("retry", book.name, None)
            self._change(book, "failed", "nobody waits for it any more")

    def _admit(self) -> None:
        """Go through the claims in their order: load what fits, put out who must go for it, refuse what cannot be."""
        self._reconsider = False
        self._sort_anew()
        expecting = self.ledger.settle(self._now)
        held: dict[str, int] = {}
        too_much: dict[tuple[tuple[str, ...], int], int] = {}
        unweighed = False
        residency: float | None = None
        for _, _, name in list(self._claims):
            book = self._books[name]
            claim = book.claim
            assert claim is not None  # who stands in the line has one
            if not claim.weighed:
                unweighed = unweighed or (claim.gentle and not claim.impatient)
                continue
            kind = (book.policy.devices, book.policy.spread)
            if claim.seen and not (claim.impatient or claim.gentle) and book.need >= too_much.get(kind, book.need + 1):
                continue
            if claim.gentle and unweighed:
                continue  # one that shall be loaded before it is still being weighed
            claim.seen = True
            plan = self._admission.plan(book, self._now, held, gentle=claim.gentle, impatient=claim.impatient)
            if claim.turn == 2 and plan.verdict == "fits" and self._is_asked_for():
                continue  # what comes free is theirs who wait
            self._follow(book, claim, plan, held)
            if plan.verdict == "blocked":
                too_much[kind] = min(book.need, too_much.get(kind, book.need))
                if plan.until is not None:
                    residency = plan.until if residency is None else min(residency, plan.until)
        self._timers.set("residency", "", residency)
        if expecting and self._claims and not self._timers.has("look", ""):
            self._timers.set("look", "", self._now + self._limits.look)
        self._spare(held)
        self._bring_back()

    def _is_asked_for(self) -> bool:
        """Tell whether anybody waits for memory."""
        claims = (self._books[name].claim for _, _, name in self._claims)
        return any(claim is not None and not claim.gentle for claim in claims)

    def _follow(self, book: Book, claim: Claim, plan: Plan, held: dict[str, int]) -> None:
        """Do as the plan says; what the model has a right to from now on is added to `held`."""
        if plan.verdict != "short":
            claim.short_until = None
        if plan.verdict == "fits":
            self._spawn(book, claim, plan.shares)
        elif plan.verdict == "refused":
            assert plan.error is not None
            self._refuse(book, plan.error)
        elif claim.gentle:
            if plan.verdict == "waits":
                self._take_turn(book, claim, 2)
                return
            if book.name not in self._returning:
                self._notice(book, f"not loaded: {wording.room(book, plan.shares, self.ledger)}")
            self._drop_claim(book)
        elif plan.verdict == "short":
            assert plan.error is not None
            self._endure(book, claim, plan.error)
        elif plan.verdict != "blocked" or claim.impatient:
            if plan.verdict == "evicts":
                self._clear(book, claim, plan)
            for device, need in plan.shares.items():
                held[device] = held.get(device, 0) + need

    def _endure(self, book: Book, claim: Claim, error: MlxsupError) -> None:
        """Wait for a while that other programs give memory back; after that it must do with what there is, or is refused."""
        if claim.short_until is None:
            claim.short_until = self._now + self._limits.patience
            self._timers.set("shortage", book.name, claim.short_until)
        elif self._now >= claim.short_until:
            if self._admission.makes_do(book):
                book.need, claim.short_until = self._admission.at_best(book.policy), None
                self._reconsider = True
            else:
                self._refuse(book, error)

    def _clear(self, book: Book, claim: Claim, plan: Plan) -> None:
        """Put out the plan's victims; from now on what they leave belongs to this claim before all others."""
        keys = [self._idle.key(victim) for victim in plan.victims if victim in self._idle]
        claim.victims = plan.victims
        for victim in plan.victims:
            text = wording.evicted(book, plan, self.ledger, self._sums(victim))
            self._evict(self._books[victim], text)
        if keys:
            self.order.evicted(max(keys))
        self._take_turn(book, claim, 0)

    def _take_turn(self, book: Book, claim: Claim, turn: int) -> None:
        """Move a claim before or behind the others."""
        if claim.turn != turn:
            del self._claims[bisect.bisect_left(self._claims, claim.place(book.name))]
            claim.turn = turn
            bisect.insort(self._claims, claim.place(book.name))

    def _spawn(self, book: Book, claim: Claim, shares: Mapping[str, int]) -> None:
        self._drop_claim(book)
        self._reconsider = False  # who comes later in the line is looked at in this very round
        self._returning.pop(book.name, None)
        book.unused, book.unloaded = claim.gentle, False
        book.generation += 1
        book.spawned_at = self._now
        self.ledger.reserve(book.name, shares, pinned=book.policy.pinned)
        self._change(book, "starting", claim.reason)
        told = {device: need for device, need in shares.items() if device != SLOTS}
        self._out.append(fx.Spawn(book.name, book.generation, told))

    def _sort_anew(self) -> None:
        """Put the idle models into the order of this time, where their keys are of another."""
        epoch = self.order.epoch(self._now)
        if epoch != self._epoch:
            self._epoch = epoch
            for name in list(self._idle):
                self._idle.add(name, self._key(self._books[name]))

    def _bring_back(self) -> None:
        """Load again who fits in beside all that is there; who is pinned need not fit, and does not stand behind others."""
        due: float | None = None
        for name in sorted(self._returning, key=lambda name: -HEAD_START[self._books[name].policy.priority]):
            book = self._books[name]
            pinned = book.policy.pinned
            if book.claim is not None or (not pinned and self._claims and self._claims[0][0] < 2):
                continue
            wait_until = max(book.again.retry_at, book.breaker.retry_at)
            if wait_until > self._now:
                due = wait_until if due is None else min(due, wait_until)
                continue
            as_it_was = copy.copy(book)
            as_it_was.need = max(book.need, self._returning[name])
            plan = self._admission.plan(as_it_was, self._now, {}, gentle=not pinned)
            if plan.error is not None and plan.error.details.get("permanent"):
                self._give_up(book, f"not loaded again: {plan.error.message}")
            elif plan.verdict == "fits" or (pinned and plan.verdict not in ("refused", "short")):
                self._want(book, "there is room for it again", gentle=not pinned)
        self._timers.set("return", "", due)

    def _give_up(self, book: Book, reason: str) -> None:
        """Load it unasked no more."""
        del self._returning[book.name]
        if book.state == "backoff":
            self._change(book, "failed", reason)
        else:
            self._notice(book, reason)

    def _look_for_memory(self) -> None:
        """While somebody waits for memory that must come back, look whether it has; `_admit` sees to the next look."""
        if self.ledger.settle(self._now) and self._claims:
            self._out.append(fx.Look())

    # Use and rest

    def _tell_loaded(self, book: Book) -> None:
        """Answer those who only wanted it to be ready."""
        for ticket in book.loading:
            book.asked_keep_alive = book.wished.pop(ticket, book.asked_keep_alive)
            self._out.append(fx.Done(ticket))
        self._waiting -= len(book.loading)
        book.loading.clear()

    def _serve_waiting(self, book: Book) -> None:
        while book.waiting and len(book.leases) < book.policy.concurrency:
            ticket = next(iter(book.waiting))
            del book.waiting[ticket]
            self._waiting -= 1
            self._grant(book, ticket)
        self._rest(book)

    def _grant(self, book: Book, ticket: int) -> None:
        book.leases.add(ticket)
        book.last_used = self._now
        if book.expires is not None:
            book.expires = None
            self._timers.set("expires", book.name, None)
        book.unused = False
        self._idle.remove(book.name)
        if book.wished:
            book.asked_keep_alive = book.wished.pop(ticket, book.asked_keep_alive)
        self.order.used(book.name, book.worth(self._size(book.name), self._now), self._now)
        self._out.append(fx.Grant(ticket, book.name, book.generation))

    def _rest(self, book: Book, since: float | None = None) -> None:
        """Let a ready model that nobody uses, `since` then or now, wait for the next request, as long as it is kept alive.

        Where that is no time at all by the configuration, what was loaded for its own sake stays until its first use.
        """
        if book.leases:
            return
        keep_alive = book.keep_alive
        if keep_alive == 0 and (book.asked_keep_alive is not None or not book.unused):
            self._stop(book, "not kept alive")
            return
        book.idle_since = self._now if since is None else since
        book.expires = book.idle_since + keep_alive if keep_alive > 0 else None
        self._timers.set("expires", book.name, book.expires)
        if book.policy.pinned:
            self._idle.remove(book.name)
        else:
            self._idle.add(book.name, self._key(book))
            self._reconsider = self._reconsider or bool(self._claims)

    # Going

    def _evict(self, book: Book, reason: str) -> None:
        """Put a model out because its memory is needed: an idle one now, a busy one when its work is done."""
        book.for_others, book.then = True, "return"
        if not book.leases:
            self._stop(book, reason)
        elif book.state == "ready":
            self._disarm(book)
            self._change(book, "draining", reason)
            self._making_room[book.name] = None

    def _spare(self, held: Mapping[str, int]) -> None:
        """Let those in use go on who were to make room, where what is `held` for claims can be had without; the best first."""
        committed = (self._books[name].claim for turn, _, name in self._claims if turn == 0)
        if not self._making_room or any(
            claim is not None and (not claim.weighed or claim.short_until is not None) for claim in committed
        ):
            return  # in the second case it cannot be said just now what is needed
        for name in reversed(list(self._making_room)):
            book, accounts = self._books[name], self.ledger.accounts
            frees = [
                (device, size) for device, size in self.ledger.counted(name).items() if size and device in accounts
            ]
            needed = any(accounts[device].soon - size < held.get(device, 0) for device, size in frees)
            if not needed and book.drain_until is None:  # else somebody else wants it gone, too
                book.for_others, book.then = False, ""
                self._change(book, "ready", "its memory is not needed any more")
                self._reconsider = bool(self._claims)  # who counted on its going waits in vain
                self._tell_loaded(book)
                self._serve_waiting(book)

    def _put_out(self, book: Book, reason: str, *, force: bool) -> None:
        """Stop the model now if nobody uses it or by force, else let the work in flight end first."""
        if book.state == "starting" or (book.state in ("ready", "draining") and (force or not book.leases)):
            self._stop(book, reason)
        elif book.state == "ready" or (book.state == "draining" and book.drain_until is None):
            self._disarm(book)
            book.drain_until = self._now + book.policy.drain_timeout
            self._timers.set("drain", book.name, book.drain_until)
            if book.state == "ready":
                self._change(book, "draining", reason)

    def _stop(self, book: Book, reason: str) -> None:
        self._disarm(book)
        self._change(book, "stopping", reason)
        self._out.append(fx.Stop(book.name, book.generation))

    def _disarm(self, book: Book) -> None:
        if book.expires is not None:
            book.expires = None
            self._timers.set("expires", book.name, None)
        if book.drain_until is not None:
            book.drain_until = None
            self._timers.set("drain", book.name, None)

    # Telling

    def _reject_waiting(self, book: Book, error: MlxsupError) -> None:
        tickets = (*book.waiting, *book.loading)
        self._out.extend(fx.Reject(ticket, error.again()) for ticket in tickets)
        self._waiting -= len(tickets)
        book.waiting.clear()
        book.loading.clear()
        book.wished.clear()

    def _refuse(self, book: Book, error: MlxsupError) -> None:
        """Say to all who wait that the model cannot be loaded; nothing was started.

        Where that can change, who is pinned or shall come back is tried again unasked.
        """
        self._drop_claim(book)
        book.error = error
        book.refused_at = self._now if error.details.get("permanent") else None
        self._reject_waiting(book, error)
        if book.refused_at is not None:
            self._returning.pop(book.name, None)
        elif book.policy.pinned:
            self._returning.setdefault(book.name, 0)
        state: State = "failed"
        if book.name in self._returning:
            state = "backoff"
            book.again.failed(self._now, 0.0)
            self._reconsider = True  # to see when its time comes
        if book.state != state:
            self._change(book, state, error.message)
        elif book.reason != error.message:
            book.reason = error.message
            self._notice(book, error.message)

    def _change(self, book: Book, state: State, reason: str) -> None:
        """Go from one state to another, and tell."""
        self._out.append(fx.Changed(book.name, book.state, state, book.generation, reason))
        was_live = book.live
        book.state, book.reason = state, reason
        if state in ("starting", "ready", "draining", "stopping"):
            book.parting = "" if state in ("starting", "ready") else reason
        self._live += book.live - was_live
        self._idle.remove(book.name)
        self._making_room.pop(book.name, None)
        departing = state == "stopping" or (state == "draining" and book.for_others)
        self.ledger.depart(book.name, departing=departing)

    def _notice(self, book: Book, reason: str) -> None:
        self._out.append(fx.Noticed(book.name, book.state, book.generation, reason))

    def _key(self, book: Book) -> float:
        return self.order.key(book.name, book.worth(self._size(book.name), self._now), self._now)

    def _size(self, name: str) -> int:
        return sum(size for device, size in self.ledger.counted(name).items() if device != SLOTS)

    def _sums(self, name: str) -> str:
        """Return the sums behind a model's place in the order."""
        return self.order.explain(name, self._books[name].worth(self._size(name), self._now))
