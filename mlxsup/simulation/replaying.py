"""Replays a load against a scheduler: loads take their time, answers theirs, and each wait is written down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.scheduler import Scheduler
from mlxsup.simulation.traces import Request, Simulated

STOP_SECONDS = 0.5
"""What a process takes to go."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a load.

    Attributes:
        requests: how many came.
        hits: granted at once, or as soon as the model had a free place: no load of it began or ended while they waited.
        loads: processes that were started.
        load_seconds: what their loads took together.
        evictions: models that were put out for others.
        refused: requests that got an error.
        waited: all seconds of waiting together.
        p50: seconds that half of them did not wait longer than.
        p99: the same for 99 of 100.
        events: what the scheduler was told.
        served: the models of those that were granted, in that order.
    """

    requests: int
    hits: int
    loads: int
    load_seconds: float
    evictions: int
    refused: int
    waited: float
    p50: float
    p99: float
    events: int
    served: Sequence[str]


def replay(scheduler: Scheduler, models: Iterable[Simulated], trace: Iterable[Request]) -> Outcome:
    """Let a trace happen to a scheduler that is new, and say what became of it."""
    return _Replay(scheduler, {model.name: model for model in models}).run(trace)


class _Replay:
    def __init__(self, scheduler: Scheduler, models: Mapping[str, Simulated]) -> None:
        self._scheduler = scheduler
        self._models = models
        self._coming: list[tuple[float, int, ev.Event]] = []
        self._count = 0
        self._came: dict[int, Request] = {}
        self._waiting: dict[str, set[int]] = {name: set() for name in models}
        self._cold: set[int] = set()
        self._waits: list[float] = []
        self._served: list[str] = []
        self._load_seconds: list[float] = []
        self._hits = self._loads = self._evictions = self._refused = self._events = 0

    def run(self, trace: Iterable[Request]) -> Outcome:
        """Go through the trace, then let what is under way end."""
        ticket = 0
        for ticket, request in enumerate(trace, 1):
            self._until(request.at)
            self._came[ticket] = request
            self._waiting[request.model].add(ticket)
            if self._scheduler.view(request.model).state != "ready":
                self._cold.add(ticket)
            self._tell(ev.Acquire(ticket, request.model), request.at)
        while self._came:
            at = min(self._coming[0][0] if self._coming else math.inf, self._wake_at())
            if at == math.inf:
                raise RuntimeError(f"{len(self._came)} requests wait for nothing")
            self._until(at)
        return Outcome(
            requests=ticket,
            hits=self._hits,
            loads=self._loads,
            load_seconds=math.fsum(self._load_seconds),
            evictions=self._evictions,
            refused=self._refused,
            waited=math.fsum(self._waits),
            p50=_quantile(self._waits, 0.5),
            p99=_quantile(self._waits, 0.99),
            events=self._events,
            served=self._served,
        )

    def _wake_at(self) -> float:
        at = self._scheduler.wake_at()
        return math.inf if at is None else at

    def _until(self, end: float) -> None:
        """Let everything happen that is due by then."""
        while True:
            coming = self._coming[0][0] if self._coming else math.inf
            wake = self._wake_at()
            if min(coming, wake) > end:
                return
            if coming <= wake:
                at, _, event = heapq.heappop(self._coming)
                self._tell(event, at)
            else:
                self._tell(ev.Tick(), wake)

    def _tell(self, event: ev.Event, now: float) -> None:
        self._events += 1
        for effect in self._scheduler.handle(event, now):
            match effect:
                case fx.Grant():
                    self._granted(effect, now)
                case fx.Spawn():
                    seconds = self._models[effect.model].load
                    self._loads += 1
                    self._load_seconds.append(seconds)
                    self._cold |= self._waiting[effect.model]
                    self._later(now + seconds, ev.Ready(effect.model, effect.generation))
                case fx.Stop():
                    self._later(now + STOP_SECONDS, ev.Gone(effect.model, effect.generation))
                case fx.Changed():
                    self._evictions += effect.state == "stopping" and effect.reason.startswith("put out")
                case fx.Reject():
                    self._refused += 1
                    self._ended(effect.ticket)
                    self._cold.discard(effect.ticket)

    def _granted(self, grant: fx.Grant, now: float) -> None:
        self._waits.append(now - self._ended(grant.ticket).at)
        self._served.append(grant.model)
        if grant.ticket in self._cold:
            self._cold.discard(grant.ticket)
        else:
            self._hits += 1
        self._later(now + self._models[grant.model].answer, ev.Release(grant.ticket, grant.model))

    def _ended(self, ticket: int) -> Request:
        """Let a request wait no longer."""
        request = self._came.pop(ticket)
        self._waiting[request.model].discard(ticket)
        return request

    def _later(self, at: float, event: ev.Event) -> None:
        self._count += 1
        heapq.heappush(self._coming, (at, self._count, event))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
