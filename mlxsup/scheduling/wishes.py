"""What the configuration wishes: who is loaded unasked, at the start and after its process went, and what changes with another one."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from mlxsup.errors import ModelNotFound
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.book import HEAD_START, Book, Policy
from mlxsup.scheduling.moves import Moves


class Wishes(Moves):
    """The steps for what nobody waits for."""

    def _start(self) -> None:
        """Ask for what shall be there from the start."""
        self._preload(self._books.values())

    def _preload(self, books: Iterable[Book]) -> None:
        """Ask for those that shall be there, the first in rank first; nobody goes for it."""
        wanted = [book for book in books if book.policy.preload and not book.live]
        for book in sorted(wanted, key=lambda book: -HEAD_START[book.policy.priority]):
            self._want(book, "preloaded", gentle=True)

    def _after(self, book: Book, *, crashed: bool, held: int) -> None:
        """Say what comes after the end of a process that held so many bytes."""
        then, book.then, book.for_others = book.then, "", False
        if book.removed:
            self._forget(book)
            return
        if then == "return" and (book.policy.comes_back or book.policy.pinned):
            self._returning[book.name] = held
        if book.waiting or book.loading:
            self._want(book, "asked for while it went")
        elif crashed and book.policy.pinned and book.refused_at is None:
            self._want(book, "pinned, and crashed")
        elif then == "renew" and book.policy.pinned:
            self._returning[book.name] = 0
        elif then == "renew":
            self._preload([book])

    def _reconfigure(self, event: ev.Reconfigure) -> None:
        self._queue, self._limits = event.queue, event.limits
        self.ledger.refit(event.devices, event.limits.max_loaded)
        self._make_admission()
        to_load = []
        for name, policy in event.policies.items():
            book = self._books.get(name)
            if book is None:
                self._books[name] = book = Book(name, policy, event.limits.backoff)
                to_load.append(book)
                continue
            self._renew(book, policy, changed=name in event.restart)
            if name in event.restart and not book.unloaded:
                to_load.append(book)
        for book in [book for name, book in self._books.items() if name not in event.policies]:
            self._remove(book)
        self._preload(to_load)
        self._reconsider = True

    def _renew(self, book: Book, policy: Policy, *, changed: bool) -> None:
        """Take over what is asked of a model from now on."""
        old, again_there = book.policy, book.removed
        book.policy, book.removed, book.refused_at = policy, False, None
        self.ledger.pin(book.name, pinned=policy.pinned)
        if changed:
            book.need = policy.memory or 0
            book.breaker.forget()
            book.again.forget()
            if book.name in self._returning:
                self._returning[book.name] = 0
            self._timers.set("retry", book.name, None)
            if book.then == "return" and not policy.comes_back:
                book.then = "renew"
        makes_room = book.state == "draining" and book.drain_until is None
        if changed and (book.state in ("starting", "ready") or makes_room):
            book.then = book.then or "renew"
            self._put_out(book, "its configuration has changed", force=False)
        elif book.live and again_there and not book.then:
            book.then = "renew"
        elif book.state == "ready" and policy != old:
            if book.leases:
                self._serve_waiting(book)
            else:
                self._rest(book, since=book.idle_since)
        if not (policy.comes_back or policy.pinned):
            self._returning.pop(book.name, None)
        elif policy.pinned and book.state in ("failed", "backoff") and not book.unloaded:
            self._returning.setdefault(book.name, 0)
        self._renew_claim(book, old, changed=changed)

    def _renew_claim(self, book: Book, old: Policy, *, changed: bool) -> None:
        """Let a model's claim go on with its place, and with what it was given: only what it needs can have changed."""
        claim, policy = book.claim, book.policy
        if changed or (old.pinned and not policy.pinned):
            self._drop_if_unwanted(book)
        if claim is not None and claim.gentle and not (policy.preload or policy.comes_back or policy.pinned):
            self._drop_claim(book)
        if claim is None and changed and book.state == "backoff" and (book.waiting or book.loading):
            self._want(book, "asked for")
        elif claim is not None and book.claim is claim:
            del self._claims[bisect.bisect_left(self._claims, claim.place(book.name))]
            claim.rank += HEAD_START[old.priority] - HEAD_START[policy.priority]
            bisect.insort(self._claims, claim.place(book.name))
            claim.seen = False
            if changed or policy.memory is not None:
                self._weigh(book, claim)

    def _remove(self, book: Book) -> None:
        book.removed = True
        gone = ModelNotFound(f"{book.name} is not configured any more", details={"model": book.name})
        self._reject_waiting(book, gone)
        self._drop_claim(book)
        if book.live:
            self._put_out(book, "it is not configured any more", force=False)
        else:
            self._forget(book)

    def _forget(self, book: Book) -> None:
        self._returning.pop(book.name, None)
        self._timers.set("retry", book.name, None)
        self.order.forget(book.name)
        del self._books[book.name]
        self._out.append(fx.Forget(book.name))
