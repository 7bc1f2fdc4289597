"""Why a model is loaded, granted, refused or put out: `handle(event, now) -> effects`, the state machine of all models.

`now` is monotonic seconds. Every ticket is answered exactly once unless its caller leaves. A leased runner is stopped only
by force or when its drain deadline passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import assert_never

import msgspec

from mlxsup.errors import Backoff, MlxsupError, QueueFull, ShuttingDown, Unloaded
from mlxsup.report import State
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of one model. `keep_alive` is seconds, negative for ever; `queue` bounds its waiters."""

    keep_alive: float
    concurrency: int
    queue: int
    drain_timeout: float


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model's scheduling state at one moment; times are monotonic, None for never."""

    state: State
    generation: int
    leases: int
    waiting: int
    last_used: float | None
    expires: float | None
    exits: int
    error: MlxsupError | None


class _Model:
    """The scheduler's book on one model."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.policy = policy
        self.state: State = "stopped"
        self.generation = 0
        self.waiting: deque[int] = deque()
        self.loading: list[int] = []
        self.unloading: list[int] = []
        self.leases: set[int] = set()
        self.last_used: float | None = None
        self.expires: float | None = None
        self.drain_until: float | None = None
        self.exits = 0
        self.error: MlxsupError | None = None

    @property
    def live(self) -> bool:
        """Whether a process exists or is being made."""
        return self.state in ("starting", "ready", "draining", "stopping", "stuck")


class Scheduler:
    """Decides for all models; does nothing itself."""

    def __init__(self, policies: Mapping[str, Policy], queue: int) -> None:
        self._models = {name: _Model(name, policy) for name, policy in policies.items()}
        self._queue = queue
        self._out: list[fx.Effect] = []
        self._now = 0.0
        self.closing = False
        self._closed = False

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Take one event and return what is to be done about it, in order."""
        self._out = []
        self._now = now
        match event:
            case ev.Acquire():
                self._acquire(self._models[event.model], event.ticket)
            case ev.Load():
                self._load(self._models[event.model], event.ticket)
            case ev.Unload():
                self._unload(self._models[event.model], event.ticket, force=event.force)
            case ev.Cancel():
                self._cancel(self._models[event.model], event.ticket)
            case ev.Release():
                self._release(self._models[event.model], event.ticket)
            case ev.Ready():
                self._ready(self._models[event.model], event.generation)
            case ev.Failing():
                self._failing(self._models[event.model], event)
            case ev.Gone():
                self._gone(self._models[event.model], event)
            case ev.Stuck():
                self._stuck(self._models[event.model], event)
            case ev.Tick():
                self._tick()
            case ev.Shutdown():
                self._shutdown(force=event.force)
            case _:
                assert_never(event)
        self._close_if_empty()
        return self._out

    def wake_at(self) -> float | None:
        """Return when a Tick is due next, None for never."""
        times = [at for model in self._models.values() for at in (model.expires, model.drain_until) if at is not None]
        return min(times, default=None)

    def view(self, name: str) -> ModelView:
        """Return one model's state."""
        model = self._models[name]
        return ModelView(
            state=model.state,
            generation=model.generation,
            leases=len(model.leases),
            waiting=len(model.waiting) + len(model.loading),
            last_used=model.last_used,
            expires=model.expires,
            exits=model.exits,
            error=model.error,
        )

    # Callers

    def _acquire(self, model: _Model, ticket: int) -> None:
        if self._refuse_new(model, ticket):
            return
        if model.state == "ready" and not model.waiting and len(model.leases) < model.policy.concurrency:
            self._grant(model, ticket)
            return
        waiting = sum(len(other.waiting) for other in self._models.values())
        if waiting >= self._queue or len(model.waiting) >= model.policy.queue:
            full = (waiting, "all models together") if waiting >= self._queue else (len(model.waiting), model.name)
            error = QueueFull("{} requests wait already, as many as may for {}".format(*full))
            self._out.append(fx.Reject(ticket, error))
            return
        model.waiting.append(ticket)
        self._want(model, "asked for")

    def _load(self, model: _Model, ticket: int) -> None:
        if self._refuse_new(model, ticket):
            return
        if model.state == "ready":
            self._arm_keep_alive(model)
            self._out.append(fx.Done(ticket))
            return
        model.loading.append(ticket)
        self._want(model, "load asked for")

    def _unload(self, model: _Model, ticket: int, *, force: bool) -> None:
        """Put the model out. What waited for it before is called off; what comes later loads it again."""
        if not model.live:
            self._out.append(fx.Done(ticket))
            return
        model.unloading.append(ticket)
        called_off = Unloaded(f"{model.name} was unloaded", details={"model": model.name})
        self._reject_waiting(model, called_off)
        self._put_out(model, "unload asked for", force=force)

    def _cancel(self, model: _Model, ticket: int) -> None:
        if ticket in model.leases:
            self._release(model, ticket)
        for line in (model.waiting, model.loading, model.unloading):
            if ticket in line:
                line.remove(ticket)

    def _release(self, model: _Model, ticket: int) -> None:
        if ticket not in model.leases:
            return
        model.leases.discard(ticket)
        model.last_used = self._now
        if model.state == "ready":
            self._serve_waiting(model)
        elif model.state == "draining" and not model.leases:
            self._stop(model, "drained")

    # Runners

    def _ready(self, model: _Model, generation: int) -> None:
        if generation != model.generation or model.state != "starting":
            return
        model.error = None
        self._change(model, "ready", "loaded")
        model.last_used = self._now
        self._out.extend(fx.Done(ticket) for ticket in model.loading)
        model.loading.clear()
        self._serve_waiting(model)

    def _failing(self, model: _Model, event: ev.Failing) -> None:
        """Tell those who waited for the load at once; those who wait behind a crash get another generation."""
        if event.generation != model.generation or model.state not in ("starting", "ready", "draining"):
            return
        model.error = event.error
        model.expires = model.drain_until = None
        if model.state == "starting":
            self._reject_waiting(model, event.error)
        self._change(model, "stopping", event.error.message)

    def _gone(self, model: _Model, event: ev.Gone) -> None:
        if event.generation != model.generation or not model.live:
            return
        model.exits += 1
        model.expires = model.drain_until = None
        model.leases.clear()  # their callers learn it from their streams; a late release finds nothing
        self._out.extend(fx.Done(ticket) for ticket in model.unloading)
        model.unloading.clear()
        if event.error is None:
            self._change(model, "stopped", "gone")
        else:
            model.error = event.error
            if model.state == "starting":
                self._reject_waiting(model, event.error)
            self._change(model, "failed", event.error.message)
        if (model.waiting or model.loading) and not self.closing:
            self._want(model, "asked for while it went")

    def _stuck(self, model: _Model, event: ev.Stuck) -> None:
        if event.generation != model.generation or not model.live:
            return
        pids = ", ".join(map(str, event.pids))
        reason = f"SIGKILL was sent to {pids}, and it is still there"
        model.error = Backoff(
            f"{model.name} cannot be started again yet: {reason}",
            retry_after=5.0,
            details={"model": model.name, "pids": list(event.pids)},
        )
        model.expires = model.drain_until = None
        if model.state != "stuck":
            self._change(model, "stuck", reason)
        self._reject_waiting(model, model.error)

    # Time and the end

    def _tick(self) -> None:
        for model in self._models.values():
            if model.drain_until is not None and model.drain_until <= self._now:
                self._stop(model, "its drain deadline passed")
            elif model.expires is not None and model.expires <= self._now:
                self._put_out(model, f"idle for {model.policy.keep_alive:g} s", force=False)

    def _shutdown(self, *, force: bool) -> None:
        self.closing = True
        error = ShuttingDown("mlxsup is shutting down")
        for model in self._models.values():
            self._reject_waiting(model, error)
            if model.live:
                self._put_out(model, "shutting down", force=force)

    def _close_if_empty(self) -> None:
        if self.closing and not self._closed and not any(model.live for model in self._models.values()):
            self._closed = True
            self._out.append(fx.Closed())

    # Steps

    def _refuse_new(self, model: _Model, ticket: int) -> bool:
        error: MlxsupError | None = None
        if self.closing:
            error = ShuttingDown("mlxsup is shutting down")
        elif model.state == "stuck" and model.error is not None:
            error = model.error.again()
        if error is not None:
            self._out.append(fx.Reject(ticket, error))
        return error is not None

    def _want(self, model: _Model, reason: str) -> None:
        """See to it that the model will be ready: spawn it, unless it is on its way up, or on its way down first."""
        if not model.live:
            model.generation += 1
            self._change(model, "starting", reason)
            self._out.append(fx.Spawn(model.name, model.generation))

    def _serve_waiting(self, model: _Model) -> None:
        while model.waiting and len(model.leases) < model.policy.concurrency:
            self._grant(model, model.waiting.popleft())
        self._arm_keep_alive(model)

    def _grant(self, model: _Model, ticket: int) -> None:
        model.leases.add(ticket)
        model.last_used = self._now
        model.expires = None
        self._out.append(fx.Grant(ticket, model.name, model.generation))

    def _arm_keep_alive(self, model: _Model) -> None:
        idle = not model.leases and model.policy.keep_alive >= 0
        model.expires = self._now + model.policy.keep_alive if idle else None
        if idle and model.policy.keep_alive == 0:
            self._put_out(model, "not kept alive", force=False)

    def _put_out(self, model: _Model, reason: str, *, force: bool) -> None:
        """Stop the model now if nobody uses it or by force, else let the work in flight end first."""
        if model.state == "starting" or (model.state in ("ready", "draining") and (force or not model.leases)):
            self._stop(model, reason)
        elif model.state == "ready":
            model.expires = None
            model.drain_until = self._now + model.policy.drain_timeout
            self._change(model, "draining", reason)

    def _stop(self, model: _Model, reason: str) -> None:
        model.expires = model.drain_until = None
        self._change(model, "stopping", reason)
        self._out.append(fx.Stop(model.name, model.generation))

    def _reject_waiting(self, model: _Model, error: MlxsupError) -> None:
        tickets: Iterable[int] = (*model.waiting, *model.loading)
        self._out.extend(fx.Reject(ticket, error.again()) for ticket in tickets)
        model.waiting.clear()
        model.loading.clear()

    def _change(self, model: _Model, state: State, reason: str) -> None:
        self._out.append(fx.Changed(model.name, model.state, state, model.generation, reason))
        model.state = state
