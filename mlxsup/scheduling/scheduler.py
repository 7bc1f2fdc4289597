"""Why a model is loaded, granted, refused or put out: `handle(event, now) -> effects`, the state machine of all models.

`now` is monotonic seconds. Every ticket is answered exactly once unless its caller leaves. A leased runner is stopped only
by force or when its drain deadline passes.
"""

from __future__ import annotations

from typing import assert_never

from mlxsup.errors import Conflict, MlxsupError, ModelNotFound, QueueFull, ShuttingDown, Unloaded
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling import wording
from mlxsup.scheduling.book import Book, Limits, ModelView, Policy
from mlxsup.scheduling.ledger import SLOTS
from mlxsup.scheduling.outlook import Outlook

__all__ = ["Limits", "ModelView", "Policy", "Scheduler"]

RECONSIDER = 1.0
"""Seconds after which it is looked again whether a model that could not be loaded at all can be now."""


class Scheduler(Outlook):
    """Decides for all models; does nothing itself."""

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Take one event and return what is to be done about it, in order."""
        self._out = []
        self._now = now
        if isinstance(event, ev.Tick):
            self._tick()
        elif isinstance(event, ev.Shutdown):
            self._shutdown(force=event.force)
        elif isinstance(event, ev.Sampled):
            self._sampled(event)
        elif isinstance(event, ev.Start):
            self._start()
        elif isinstance(event, ev.Reconfigure):
            self._reconfigure(event)
        elif (book := self._books.get(event.model)) is not None:
            self._handle_one(book, event)
        elif isinstance(event, ev.Acquire | ev.Load):
            self._out.append(fx.Reject(event.ticket, ModelNotFound(f"no model is named {event.model!r}")))
        elif isinstance(event, ev.Unload):
            self._out.append(fx.Done(event.ticket))
        while self._reconsider:
            self._admit()
        self._close_if_empty()
        return self._out

    def _handle_one(
        self,
        book: Book,
        event: ev.Acquire
        | ev.Load
        | ev.Unload
        | ev.Cancel
        | ev.Release
        | ev.Weighed
        | ev.Unfit
        | ev.Ready
        | ev.Failing
        | ev.Gone
        | ev.Stuck,
    ) -> None:
        match event:
            case ev.Acquire():
                self._acquire(book, event)
            case ev.Release():
                self._release(book, event.ticket)
            case ev.Load():
                self._load(book, event)
            case ev.Unload():
                self._unload(book, event.ticket, force=event.force)
            case ev.Cancel():
                self._cancel(book, event.ticket)
            case ev.Weighed():
                self._weighed(book, event)
            case ev.Unfit():
                if book.claim is not None and event.attempt == book.attempt:
                    self._refuse(book, event.error)
            case ev.Ready():
                self._ready(book, event.generation)
            case ev.Failing():
                self._failing(book, event)
            case ev.Gone():
                self._gone(book, event)
            case ev.Stuck():
                self._stuck(book, event)
            case _:
                assert_never(event)

    # Looking on

    @property
    def models(self) -> list[str]:
        """The models there are, those that are on their way out of the configuration included."""
        return list(self._books)

    @property
    def idle(self) -> list[str]:
        """The models that are loaded and unused, in the order in which they would go."""
        return list(self._idle)

    @property
    def live(self) -> bool:
        """Whether any process exists or is being made."""
        return bool(self._live)

    @property
    def hungry(self) -> bool:
        """Whether somebody waits for memory, and it is known for how much."""
        return any(claim.weighed for _, _, name in self._claims if (claim := self._books[name].claim) is not None)

    @property
    def expectant(self) -> bool:
        """Whether a model is to be loaded as soon as there is room for it, though nobody asks for it."""
        return bool(self._returning)

    def view(self, name: str) -> ModelView:
        """Return one model's state."""
        shares = self.ledger.counted(name)
        shares.pop(SLOTS, None)
        return self._books[name].view(shares, returning=name in self._returning)

    # Callers

    def _acquire(self, book: Book, event: ev.Acquire) -> None:
        if self._refuse_new(book, event.ticket):
            return
        if event.keep_alive is not None:
            book.wished[event.ticket] = event.keep_alive
        if book.state == "ready" and not book.waiting and len(book.leases) < book.policy.concurrency:
            self._grant(book, event.ticket)
            return
        if (full := self._full(book)) is not None:
            book.wished.pop(event.ticket, None)
            self._out.append(fx.Reject(event.ticket, full))
            return
        book.waiting[event.ticket] = self._now
        self._waiting += 1
        self._want(book, "asked for")

    def _load(self, book: Book, event: ev.Load) -> None:
        """Load it: a wish of its own, so what was beyond help is tried once more."""
        book.refused_at = None
        if self._refuse_new(book, event.ticket):
            return
        if book.state == "ready":
            if event.keep_alive is not None:
                book.asked_keep_alive = event.keep_alive
            self._rest(book)
            self._out.append(fx.Done(event.ticket))
            return
        if (full := self._full(book)) is not None:
            self._out.append(fx.Reject(event.ticket, full))
            return
        if event.keep_alive is not None:
            book.wished[event.ticket] = event.keep_alive
        book.loading[event.ticket] = self._now
        self._waiting += 1
        self._want(book, "load asked for")

    def _unload(self, book: Book, ticket: int, *, force: bool) -> None:
        """Put the model out. What waited for it before is called off; what comes later loads it again."""
        if book.policy.pinned and book.live and not force:
            error = Conflict(f"{book.name} is pinned; unload it by force", details={"model": book.name})
            self._out.append(fx.Reject(ticket, error))
            return
        self._reject_waiting(book, Unloaded(f"{book.name} was unloaded", details={"model": book.name}))
        self._returning.pop(book.name, None)
        book.then, book.unloaded = "", True
        self._drop_claim(book)
        book.asked_keep_alive = book.refused_at = None
        book.breaker.forget()  # whoever asks for it next means a new beginning
        if book.live:
            book.unloading.append(ticket)
            self._put_out(book, "unload asked for", force=force)
            return
        if book.state == "backoff":
            self._change(book, "stopped", "unload asked for")
        self._out.append(fx.Done(ticket))

    def _cancel(self, book: Book, ticket: int) -> None:
        if ticket in book.leases:
            self._release(book, ticket)
        if book.waiting.pop(ticket, None) is not None:
            self._waiting -= 1
        keep_alive = book.wished.pop(ticket, None)
        if book.loading.pop(ticket, None) is not None:
            self._waiting -= 1
            if book.state == "starting":  # the load goes on, as it was asked for
                book.unused = True
                book.asked_keep_alive = book.asked_keep_alive if keep_alive is None else keep_alive
        if ticket in book.unloading:
            book.unloading.remove(ticket)
        self._drop_if_unwanted(book)

    def _release(self, book: Book, ticket: int) -> None:
        if ticket not in book.leases:
            return
        book.leases.discard(ticket)
        book.last_used = self._now
        if book.state == "ready":
            self._serve_waiting(book)
        elif book.state == "draining" and not book.leases:
            self._stop(book, "drained" if not book.for_others else book.reason)

    # Runners

    def _weighed(self, book: Book, event: ev.Weighed) -> None:
        if book.claim is not None and event.attempt == book.attempt:
            book.need, book.least, book.source = self._admission.need(book.policy, event), event.least, event.source
            book.seconds = book.seconds or event.seconds
            book.claim.weighed = self._reconsider = True

    def _ready(self, book: Book, generation: int) -> None:
        if generation != book.generation or book.state != "starting":
            return
        book.error = None
        book.breaker.ready(self._now)
        book.again.ready(self._now)
        book.learn(self._now - book.spawned_at)
        book.ready_at = book.last_used = self._now
        self._change(book, "ready", "loaded")
        book.unused = book.unused or bool(book.loading)
        self._tell_loaded(book)
        self._serve_waiting(book)
        self._reconsider = self._reconsider or bool(self._claims)  # in use or not, from now on its time runs

    def _failing(self, book: Book, event: ev.Failing) -> None:
        """Tell those who waited for the load at once; those who wait behind a crash get another generation."""
        if event.generation != book.generation or book.state not in ("starting", "ready", "draining"):
            return
        book.error = event.error
        self._disarm(book)
        if book.state == "starting":
            self._reject_waiting(book, event.error)
        self._change(book, "stopping", event.error.message)

    def _gone(self, book: Book, event: ev.Gone) -> None:
        if event.generation != book.generation or not book.live:
            return
        book.exits += 1
        self._disarm(book)
        book.leases.clear()  # their callers learn it from their streams; a late release finds nothing
        book.asked_keep_alive = None
        self._out.extend(fx.Done(ticket) for ticket in book.unloading)
        asked_to_go = bool(book.unloading)
        book.unloading.clear()
        held = self._size(book.name)
        self.ledger.release(book.name, self._now + self._limits.settle)
        if event.error is None:
            self._change(book, "stopped", "gone")
        else:
            self._failed(book, event.error, event.jitter)
        if not self.closing:
            self._after(book, crashed=event.error is not None and not asked_to_go, held=held)
        self._look_for_memory()
        self._reconsider = True

    def _failed(self, book: Book, error: MlxsupError, jitter: float) -> None:
        book.error = error
        if error.details.get("permanent"):
            book.refused_at = float("inf")  # a look would not show whether it is mended
        else:
            book.breaker.failed(self._now, jitter)
        if book.state == "starting":
            self._reject_waiting(book, error)
        self._change(book, "failed", error.message)

    def _stuck(self, book: Book, event: ev.Stuck) -> None:
        if event.generation != book.generation or not book.live:
            return
        book.error = wording.stuck(book.name, event.pids)
        self._disarm(book)
        if book.state != "stuck":
            self._change(book, "stuck", book.error.details["reason"])
        self._reject_waiting(book, book.error)
        self._reconsider = True

    def _sampled(self, event: ev.Sampled) -> None:
        """Take note of what is free and used; where a device is overdrawn, idle models go."""
        self.ledger.settle(self._now)
        self.ledger.see(event.free)
        for name, (generation, used) in event.used.items():
            book = self._books.get(name)
            if book is None or not book.live or book.generation != generation:
                continue
            if self.ledger.measure(name, used):
                self._notice(book, wording.outgrown(self.ledger.holdings[name]))
        self._sort_anew()
        for account in self.ledger.accounts.values():
            if not account.shortage:
                account.low = False
                continue
            for name in self._admission.pressed(account):
                self._books[name].again.failed(self._now, 0.0)
                self._evict(self._books[name], wording.pressure(account, self._sums(name)))
            if account.shortage and not account.low:
                account.low = True
                self._out.append(fx.Noticed("", "ready", 0, wording.low(account)))
        self._reconsider = bool(self._claims or self._returning or self._making_room)

    # Time, the beginning and the end

    def _tick(self) -> None:
        while (due := self._timers.take_due(self._now)) is not None:
            kind, name = due
            if kind == "look":
                self._look_for_memory()
                self._reconsider = True
                continue
            book = self._books.get(name)
            if kind in ("residency", "shortage", "return"):
                self._reconsider = True
                if kind == "shortage" and book is not None and book.claim is not None:
                    book.claim.seen = False  # it is looked at, even behind one that asks for less in vain
            elif book is None:
                continue
            elif kind == "expires":
                self._stop(book, f"idle for {book.keep_alive:g} s")
            elif kind == "drain":
                self._stop(book, "its drain deadline passed")
            elif kind == "patience" and book.claim is not None:
                book.claim.impatient = self._reconsider = True
            elif kind == "retry" and book.state == "backoff":
                wished = book.waiting or book.loading or book.policy.pinned
                self._want(book, "tried again after a failure", gentle=not wished)

    def _shutdown(self, *, force: bool) -> None:
        self.closing = True
        self._returning.clear()
        error = ShuttingDown("mlxsup is shutting down")
        for book in self._books.values():
            self._reject_waiting(book, error)
            self._drop_claim(book)
            if book.live:
                self._put_out(book, "shutting down", force=force)
            elif book.state == "backoff":
                self._change(book, "failed", "shutting down")

    def _close_if_empty(self) -> None:
        if self.closing and not self._closed and not self._live:
            self._closed = True
            self._out.append(fx.Closed())

    # What stands against a model

    def _refuse_new(self, book: Book, ticket: int) -> bool:
        error = ShuttingDown("mlxsup is shutting down") if self.closing else self._fault(book)
        if error is not None:
            self._out.append(fx.Reject(ticket, error))
        return error is not None

    def _full(self, book: Book) -> QueueFull | None:
        """Return why nobody more may wait, if so: who waits for a place and who waits for a load count alike."""
        waiting = len(book.waiting) + len(book.loading)
        if self._waiting >= self._queue:
            return QueueFull(f"{self._waiting} requests wait already, as many as may for all models together")
        if waiting >= book.policy.queue:
            return QueueFull(f"{waiting} requests wait already, as many as may for {book.name}")
        return None

    def _fault(self, book: Book) -> MlxsupError | None:
        """Return why a model cannot even be waited for now."""
        if book.removed:
            return ModelNotFound(f"{book.name} is not configured any more", details={"model": book.name})
        if book.error is None:
            return None
        if book.state == "stuck":
            return book.error.again()
        if book.refused_at is not None and not book.live:
            return None if self._now - book.refused_at >= RECONSIDER else book.error.again()
        trying = book.state == "starting" or book.claim is not None
        if book.breaker.open and (trying or self._now < book.breaker.retry_at):
            return wording.broken(book, self._now)
        return None
