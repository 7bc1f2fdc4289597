"""A scheduler with a clock of its own, and short names for what it is told and what it decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

from mlxsup.errors import LoadFailed, MlxsupError
from mlxsup.report import State
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.backoff import Backoff
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, ModelView, Policy, Scheduler

E = TypeVar("E", bound=fx.Effect)

GIB = 1 << 30
UNLIMITED = Limits()

AT_ONCE = Limits(backoff=Backoff(first=0.0, failures=1000))
"""What failed may be tried again at once, and there is memory for everything."""


def policy(*, keep_alive: float = 60, concurrency: int = 1, queue: int = 100, drain_timeout: float = 30) -> Policy:
    return Policy(keep_alive=keep_alive, concurrency=concurrency, queue=queue, drain_timeout=drain_timeout)


class Driver:
    """Tells a scheduler what happens and returns what it decides; `now` moves only when a test moves it."""

    def __init__(self, queue: int = 100, **policies: Policy) -> None:
        self.scheduler = Scheduler(policies or {"m": policy()}, queue, AT_ONCE)
        self.now = 1000.0
        self._tickets = itertools.count(1)

    def tell(self, *events: ev.Event) -> list[fx.Effect]:
        return [effect for event in events for effect in self.scheduler.handle(event, self.now)]

    def view(self, model: str = "m") -> ModelView:
        return self.scheduler.view(model)

    def state(self, model: str = "m") -> State:
        return self.view(model).state

    # What callers do; each returns the ticket and what was decided

    def acquire(self, model: str = "m") -> tuple[int, list[fx.Effect]]:
        ticket = next(self._tickets)
        return ticket, self.tell(ev.Acquire(ticket, model))

    def load(self, model: str = "m") -> tuple[int, list[fx.Effect]]:
        ticket = next(self._tickets)
        return ticket, self.tell(ev.Load(ticket, model))

    def unload(self, model: str = "m", *, force: bool = False) -> tuple[int, list[fx.Effect]]:
        ticket = next(self._tickets)
        return ticket, self.tell(ev.Unload(ticket, model, force))

    def release(self, ticket: int, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Release(ticket, model))

    def cancel(self, ticket: int, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Cancel(ticket, model))

    # What runners do

    def ready(self, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Ready(model, self.view(model).generation))

    def gone(self, error: MlxsupError | None = None, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Gone(model, self.view(model).generation, error))

    def failing(self, error: MlxsupError, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Failing(model, self.view(model).generation, error))

    def stuck(self, model: str = "m") -> list[fx.Effect]:
        return self.tell(ev.Stuck(model, self.view(model).generation, [4711]))

    def after(self, seconds: float) -> list[fx.Effect]:
        """Let time pass; a Tick comes whenever one is due, and none otherwise."""
        end, found = self.now + seconds, []
        while (due := self.scheduler.wake_at()) is not None and due <= end:
            self.now = max(self.now, due)
            found += self.tell(ev.Tick())
            again = self.scheduler.wake_at()
            assert again is None or again > self.now, "a Tick left itself to be done again at once"
        self.now = end
        return found

    # What is asked from outside

    def explained(self, model: str = "m") -> str:
        return self.scheduler.explain(model, self.now)

    def reconfigure(self, *, restart: tuple[str, ...] = (), **policies: Policy) -> list[fx.Effect]:
        """Take over other models on the same devices."""
        devices = tuple(account.device for account in self.scheduler.ledger.accounts.values())
        return self.tell(
            ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=devices, restart=frozenset(restart))
        )

    # Ways to get somewhere

    def loaded(self, model: str = "m") -> None:
        """Have the model ready and idle."""
        self.load(model)
        self.ready(model)
        assert self.state(model) == "ready"

    def leased(self, model: str = "m") -> int:
        """Have the model ready and leased."""
        ticket, _ = self.acquire(model)
        self.ready(model)
        assert self.view(model).leases >= 1
        return ticket


def model(gib: float = 1, **keys: object) -> Policy:
    common = {"keep_alive": 600.0, "concurrency": 1, "queue": 100, "drain_timeout": 30.0, "devices": ("cpu",)}
    return Policy(**{**common, "memory": int(gib * GIB), **keys})  # type: ignore[arg-type]


class Short(Driver):
    """A driver with a device of so many GiB."""

    def __init__(
        self, gib: float = 3, limits: Limits = UNLIMITED, devices: tuple[Device, ...] = (), **policies: Policy
    ) -> None:
        super().__init__()
        devices = devices or (Device(name="cpu", total=int(gib * GIB)),)
        self.scheduler = Scheduler(policies, 100, limits, devices)

    def sampled(self, free: float, **used: float) -> list[fx.Effect]:
        looks = {name: (self.view(name).generation, {"cpu": int(size * GIB)}) for name, size in used.items()}
        return self.tell(ev.Sampled({"cpu": int(free * GIB)}, looks))


def only(found: Iterable[fx.Effect], kind: type[E]) -> list[E]:
    return [effect for effect in found if isinstance(effect, kind)]


def spawned(found: Sequence[fx.Effect]) -> list[str]:
    return [effect.model for effect in only(found, fx.Spawn)]


def stopped(found: Sequence[fx.Effect]) -> list[str]:
    return [effect.model for effect in only(found, fx.Stop)]


def granted(found: Sequence[fx.Effect]) -> list[int]:
    return [effect.ticket for effect in only(found, fx.Grant)]


def done(found: Sequence[fx.Effect]) -> list[int]:
    return [effect.ticket for effect in only(found, fx.Done)]


def rejected(found: Sequence[fx.Effect]) -> dict[int, str]:
    """Ticket to error code."""
    return {effect.ticket: effect.error.code for effect in only(found, fx.Reject)}


def answered(found: Sequence[fx.Effect]) -> list[int]:
    return [*granted(found), *done(found), *rejected(found)]


def changes(found: Sequence[fx.Effect]) -> list[tuple[State, State]]:
    return [(effect.previous, effect.state) for effect in only(found, fx.Changed)]


def broken(message: str = "no such file") -> LoadFailed:
    return LoadFailed(message, details={"last_words": ["bye"]})
