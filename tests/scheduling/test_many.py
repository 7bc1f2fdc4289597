"""Many models on devices too small for all of them: the promises that the scheduler keeps in any order of events.

The world here is what the registry and the machine would be: processes that exist and hold memory, tickets that wait, leases
that are held, other programs that take memory. It believes the effects alone, and checks each against what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy, Scheduler

PICK = st.integers(0, 1 << 16)
GIB = 1 << 30

MODELS = {
    "small": Policy(keep_alive=60, concurrency=2, queue=4, drain_timeout=10, memory=1 * GIB, devices=("a",)),
    "brief": Policy(keep_alive=0, concurrency=1, queue=4, drain_timeout=10, memory=2 * GIB, devices=("a",)),
    "weighed": Policy(keep_alive=30, concurrency=1, queue=4, drain_timeout=10, memory=None, devices=("a",)),
    "urgent": Policy(
        keep_alive=-1, concurrency=1, queue=4, drain_timeout=10, memory=2 * GIB, devices=("a",), priority="high"
    ),
    "last": Policy(
        keep_alive=-1, concurrency=1, queue=4, drain_timeout=10, memory=3 * GIB, devices=("a", "b"), priority="low"
    ),
    "split": Policy(
        keep_alive=60, concurrency=1, queue=4, drain_timeout=10, memory=5 * GIB, devices=("a", "b"), spread=2
    ),
    "pinned": Policy(keep_alive=60, concurrency=1, queue=4, drain_timeout=10, memory=GIB, devices=("b",), pinned=True),
    "guest": Policy(
        keep_alive=-1,
        concurrency=1,
        queue=4,
        drain_timeout=10,
        memory=GIB,
        devices=("b",),
        preload=True,
        comes_back=True,
    ),
    "never": Policy(keep_alive=60, concurrency=1, queue=4, drain_timeout=10, memory=9 * GIB, devices=("a",)),
}
NAMES = st.sampled_from(sorted(MODELS))
TOTAL = {"a": 4 * GIB, "b": 3 * GIB}
KEPT = GIB // 4
DEVICES = tuple(Device(name=name, total=total, minimum=KEPT) for name, total in TOTAL.items())
WEIGHT = 3 * GIB


@dataclass
class Process:
    """One that exists; `uses` is what it takes of memory by now."""

    model: str
    generation: int
    shares: dict[str, int]
    uses: dict[str, int] = field(default_factory=dict)
    ready: bool = False
    ready_at: float = 0.0
    told: bool = False
    failing: bool = False
    excused: bool = False
    """Made pinned when it was on its way out already."""


@dataclass
class Ticket:
    kind: str
    model: str
    came: float
    answered: bool = False
    left: bool = False


class ManyModels(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.policies = dict(MODELS)
        self.processes: dict[str, Process] = {}
        self.generations = dict.fromkeys(MODELS, 0)
        self.tickets: dict[int, Ticket] = {}
        self.leases: dict[int, Process] = {}
        self.questions: dict[str, int] = {}
        self.others = {"a": 0, "b": 0}
        """Memory that other programs take."""
        self.late: list[tuple[float, dict[str, int]]] = []
        """Memory of processes that are gone which the system shows as free only later."""
        self.closing = self.closed = False
        self.forced = False
        self.watched = False
        self.scheduler = Scheduler({}, 1)
        self.limits = Limits()

    @initialize(residency=st.sampled_from([0.0, 5.0]), slots=st.sampled_from([0, 2]), watched=st.booleans())
    def begin(self, residency: float, slots: int, watched: bool) -> None:
        self.limits = Limits(min_residency=residency, max_loaded=slots, patience=15.0)
        self.scheduler = Scheduler(MODELS, 12, self.limits, DEVICES)
        self.watched = watched
        if watched:
            self.sample()

    # Telling the scheduler, and believing what it decides

    def tell(self, event: ev.Event, *, forced: bool = False) -> None:
        for effect in self.scheduler.handle(event, self.now):
            self.check(effect, event, forced=forced)

    def check(self, effect: fx.Effect, event: ev.Event, *, forced: bool) -> None:
        match effect:
            case fx.Weigh():
                self.questions[effect.model] = effect.attempt
            case fx.Spawn():
                self.on_spawn(effect)
            case fx.Stop():
                self.on_stop(effect, event, forced=forced)
            case fx.Grant():
                ticket = self.answer(effect.ticket)
                process = self.processes[effect.model]
                assert (ticket.kind, ticket.model) == ("acquire", effect.model)
                assert process.generation == effect.generation
                assert process.ready
                assert not process.told
                assert not process.failing
                earlier = self.waiting(effect.model, "acquire")
                assert not earlier or earlier[0] > effect.ticket, "served out of turn"
                self.leases[effect.ticket] = process
                assert len(self.held(process)) <= self.policies[effect.model].concurrency
            case fx.Done():
                ticket = self.answer(effect.ticket)
                lives = effect_model_lives = ticket.model in self.processes
                assert lives == (ticket.kind == "load")
                assert not effect_model_lives or self.processes[ticket.model].ready
            case fx.Reject():
                ticket = self.answer(effect.ticket)
                if effect.error.code == "does_not_fit" and (self.policies[ticket.model].memory or 0) > sum(
                    TOTAL.values()
                ):
                    assert effect.error.details["permanent"]
                assert ticket.kind != "unload" or effect.error.code == "conflict"
            case fx.Closed():
                assert self.closing
                assert not self.processes
                self.closed = True

    def on_spawn(self, spawn: fx.Spawn) -> None:
        assert not self.closing
        assert spawn.model not in self.processes, "two processes of one model"
        assert spawn.generation > self.generations[spawn.model]
        self.generations[spawn.model] = spawn.generation
        policy = self.policies[spawn.model]
        need = WEIGHT if policy.memory is None else policy.memory
        assert need <= sum(spawn.shares.values()) < need + len(spawn.shares)
        assert set(spawn.shares) <= set(policy.devices)
        assert len(spawn.shares) <= policy.spread
        self.processes[spawn.model] = Process(spawn.model, spawn.generation, dict(spawn.shares))
        self.nothing_is_overdrawn()
        wanted = self.waiting(spawn.model, "acquire", "load")
        assert wanted or policy.pinned or policy.preload or policy.comes_back, "loaded for nobody"

    def on_stop(self, stop: fx.Stop, event: ev.Event, *, forced: bool) -> None:
        process = self.processes[stop.model]
        assert process.generation == stop.generation
        assert not process.told, "stopped twice"
        process.told = True
        reason = self.scheduler.view(stop.model).reason
        if self.held(process):
            assert forced or "deadline" in reason, "a leased process was stopped"
        if "put out" in reason:
            assert process.ready, "put out while it was loaded"
            assert process.excused or not self.policies[stop.model].pinned, "a pinned model was put out"
            if "put out because" not in reason:
                assert self.now >= process.ready_at + self.limits.min_residency, "put out too soon"

    def answer(self, number: int) -> Ticket:
        ticket = self.tickets[number]
        assert not ticket.answered, "answered twice"
        assert not ticket.left, "answered after it left"
        ticket.answered = True
        return ticket

    def ask(self, kind: str, model: str) -> int:
        number = len(self.tickets) + 1
        self.tickets[number] = Ticket(kind, model, self.now)
        return number

    def held(self, process: Process) -> list[int]:
        return [ticket for ticket, holder in self.leases.items() if holder is process]

    def waiting(self, model: str, *kinds: str) -> list[int]:
        return [
            number
            for number, ticket in self.tickets.items()
            if ticket.model == model and ticket.kind in kinds and not ticket.answered and not ticket.left
        ]

    def end(self, process: Process) -> None:
        del self.processes[process.model]
        for ticket in self.held(process):
            del self.leases[ticket]
        if process.uses:
            self.late.append((self.now, process.uses))

    # Callers

    @rule(model=NAMES, keep_alive=st.sampled_from([None, None, 0.0, 5.0, -1.0]))
    def acquire(self, model: str, keep_alive: float | None = None) -> None:
        number = self.ask("acquire", model)
        process = self.processes.get(model)
        idle = process is not None and self.scheduler.view(model).state == "ready"
        free = process is not None and len(self.held(process)) < self.policies[model].concurrency
        behind = self.waiting(model, "acquire")[:-1]
        self.tell(ev.Acquire(number, model, keep_alive))
        if idle and free and not behind and not self.closing:
            assert number in self.leases, "a ready model was not granted at once"

    @rule(model=NAMES)
    def load(self, model: str) -> None:
        self.tell(ev.Load(self.ask("load", model), model))

    @rule(model=NAMES, force=st.booleans())
    def unload(self, model: str, force: bool) -> None:
        self.tell(ev.Unload(self.ask("unload", model), model, force), forced=force)

    @precondition(lambda self: self.tickets)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        number = 1 + pick % len(self.tickets)
        ticket = self.tickets[number]
        ticket.left = True
        self.leases.pop(number, None)
        self.tell(ev.Cancel(number, ticket.model))

    @precondition(lambda self: self.leases)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        number = sorted(self.leases)[pick % len(self.leases)]
        del self.leases[number]
        self.tell(ev.Release(number, self.tickets[number].model))

    # Runners and the machine

    @precondition(lambda self: self.questions)
    @rule(pick=PICK, known=st.booleans())
    def is_weighed(self, pick: int, known: bool) -> None:
        model = sorted(self.questions)[pick % len(self.questions)]
        attempt = self.questions.pop(model)
        self.tell(ev.Weighed(model, attempt, WEIGHT) if known else ev.Unfit(model, attempt, LoadFailed("no such file")))

    @precondition(lambda self: self.processes)
    @rule(pick=PICK)
    def becomes_ready(self, pick: int) -> None:
        process = list(self.processes.values())[pick % len(self.processes)]
        if not (process.ready or process.failing):
            process.ready, process.ready_at = not process.told, self.now
            process.uses = dict(process.shares)
            self.tell(ev.Ready(process.model, process.generation))

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, failing=st.booleans(), jitter=st.floats(0, 1), really=st.integers(0, 3))
    def dies(self, pick: int, failing: bool, jitter: float, really: int) -> None:
        if really:
            return
        process = list(self.processes.values())[pick % len(self.processes)]
        if failing and not process.failing:
            process.failing = True
            self.tell(ev.Failing(process.model, process.generation, RunnerDied("it died")))
        self.end(process)
        self.tell(ev.Gone(process.model, process.generation, RunnerDied("it died"), jitter))

    @precondition(lambda self: any(process.told for process in self.processes.values()))
    @rule(pick=PICK)
    def obeys(self, pick: int) -> None:
        told = [process for process in self.processes.values() if process.told]
        process = told[pick % len(told)]
        self.end(process)
        self.tell(ev.Gone(process.model, process.generation))

    @precondition(lambda self: self.watched)
    @rule(size=st.sampled_from([0, GIB // 2, 3 * GIB]), device=st.sampled_from(["a", "b"]))
    def others_take(self, size: int, device: str) -> None:
        self.others[device] = size
        self.sample()

    @precondition(lambda self: self.watched and self.processes)
    @rule(pick=PICK, more=st.sampled_from([0, GIB // 4, 2 * GIB]))
    def grows(self, pick: int, more: int) -> None:
        process = list(self.processes.values())[pick % len(self.processes)]
        if process.ready:
            process.uses = {device: share + more for device, share in process.shares.items()}
            self.sample()

    def sample(self) -> None:
        """What the system would say now: memory of the dead comes back two seconds late."""
        self.late = [(at, uses) for at, uses in self.late if self.now < at + 2]
        free = {}
        for device, total in TOTAL.items():
            taken = sum(process.uses.get(device, 0) for process in self.processes.values())
            taken += sum(uses.get(device, 0) for _, uses in self.late)
            free[device] = max(0, total - taken - self.others[device])
        used = {name: (process.generation, dict(process.uses)) for name, process in self.processes.items()}
        self.tell(ev.Sampled(free, used))

    # Time, and the end

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 16.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.scheduler.wake_at()) is not None and due <= end:
            self.now = max(self.now, due)
            self.tell(ev.Tick())
            again = self.scheduler.wake_at()
            assert again is None or again > self.now, "a Tick left itself to be done again at once"
        self.now = end
        if self.watched:
            self.sample()

    @rule()
    def starts(self) -> None:
        if not self.closing:
            self.tell(ev.Start())

    @rule(really=st.integers(0, 19), force=st.booleans())
    def shut_down(self, really: int, force: bool) -> None:
        if not really:  # seldom, or there would be little else
            self.closing = True
            self.tell(ev.Shutdown(force), forced=force)

    # What is true at any time

    def nothing_is_overdrawn(self) -> None:
        for device, total in TOTAL.items():
            reserved = sum(process.shares.get(device, 0) for process in self.processes.values())
            assert reserved <= total - KEPT, f"more is given out of {device} than it has"
        if self.limits.max_loaded:
            assert len(self.processes) <= self.limits.max_loaded

    @invariant()
    def the_ledger_adds_up(self) -> None:
        for name, account in self.scheduler.ledger.accounts.items():
            holdings = self.scheduler.ledger.holdings
            assert holdings.keys() == self.processes.keys()
            assert account.counted == sum(holding.counted(name) for holding in holdings.values())
            unfulfilled = [
                max(0, holding.reserved.get(name, 0) - holding.measured.get(name, 0)) for holding in holdings.values()
            ]
            assert account.unfulfilled == sum(unfulfilled)
            leaving = [holding.counted(name) for holding in holdings.values() if holding.departing]
            assert account.departing == sum(leaving)
        for name, process in self.processes.items():
            assert process.shares == {
                device: size
                for device, size in self.scheduler.ledger.holdings[name].reserved.items()
                if device in TOTAL
            }

    @invariant()
    def the_scheduler_sees_the_world_as_it_is(self) -> None:
        if not self.scheduler.models:
            return
        idle = []
        for model, policy in self.policies.items():
            if model not in self.scheduler.models:
                assert model not in self.processes
                continue
            view, process = self.scheduler.view(model), self.processes.get(model)
            assert (process is None) == (view.state in ("stopped", "failed", "backoff"))
            assert view.waiting == len(self.waiting(model, "acquire", "load"))
            assert self.scheduler._books[model].wished.keys() <= set(self.waiting(model, "acquire", "load"))
            if process is not None:
                assert view.generation == process.generation
                assert view.leases == len(self.held(process))
                assert view.state not in ("ready", "draining") or (process.ready and not process.told)
                if view.state == "ready" and not view.leases and not policy.pinned:
                    idle.append(model)
        assert sorted(self.scheduler.idle) == sorted(idle)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for model in self.policies:
            if not self.waiting(model, "acquire", "load"):
                continue
            view = self.scheduler.view(model)
            assert not self.closing
            assert model in self.processes or view.claimed or view.state == "backoff"
            assert view.state != "backoff" or view.claimed or self.scheduler.wake_at() is not None

    @invariant()
    def closed_when_nothing_lives(self) -> None:
        assert self.closed == (self.closing and not self.processes)

    @invariant()
    def who_could_be_helped_is_helped(self) -> None:
        """Where one model alone waits, nothing goes that could make room, and idle ones together have enough: a mistake."""
        claimed = [model for model in self.scheduler.models if self.scheduler.view(model).claimed]
        leaving = [process for process in self.processes.values() if process.told]
        if len(claimed) != 1 or self.questions or leaving or self.watched or self.limits.max_loaded:
            return
        policy = self.policies[claimed[0]]
        need = WEIGHT if policy.memory is None else policy.memory
        for device in policy.devices if policy.spread == 1 else ():
            kept = [
                process.shares.get(device, 0)
                for name, process in self.processes.items()
                if name not in self.scheduler.idle or self.now < process.ready_at + self.limits.min_residency
            ]
            assert need > TOTAL[device] - KEPT - sum(kept), f"{claimed[0]} waits for nothing"

    @rule(model=NAMES)
    def explain(self, model: str) -> None:
        before = [self.scheduler.view(name) for name in self.scheduler.models]
        assert model not in self.scheduler.models or self.scheduler.explain(model, self.now)
        assert [self.scheduler.view(name) for name in self.scheduler.models] == before

    @rule(model=NAMES)
    def use(self, model: str) -> None:
        """Ask for a model, and let all work there is be done."""
        self.acquire(model)
        for process in list(self.processes.values()):
            if not (process.ready or process.told or process.failing):
                process.ready, process.ready_at = True, self.now
                process.uses = dict(process.shares)
                self.tell(ev.Ready(process.model, process.generation))
        while self.leases:
            self.release(0)

    def teardown(self) -> None:
        """From wherever it is: once work ends and processes obey, everybody is answered, and a shutdown ends everything."""
        if not self.scheduler.models:
            return
        self.others = dict.fromkeys(self.others, 0)
        self.let_all_be_answered()
        self.closing = True
        self.tell(ev.Shutdown())
        for _ in range(400):
            if not self.processes:
                break
            self.step()
        assert self.closed

    def let_all_be_answered(self) -> None:
        for _ in range(400):
            if not any(self.waiting(model, "acquire", "load", "unload") for model in MODELS):
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    def step(self) -> None:
        """Let happen what must happen sooner or later."""
        if self.leases:
            return self.release(0)
        if self.questions:
            return self.is_weighed(0, known=True)
        for process in list(self.processes.values()):
            if process.told or process.failing:
                self.end(process)
                return self.tell(ev.Gone(process.model, process.generation))
            if not process.ready:
                process.ready, process.ready_at = True, self.now
                return self.tell(ev.Ready(process.model, process.generation))
        return self.time_passes(0.5)


SETTINGS = hypothesis.settings(
    max_examples=1000,
    stateful_step_count=50,
    report_multiple_bugs=False,
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@pytest.mark.timeout(400)  # about a minute on a free machine; a failure is made small before it is shown
def test_the_promises_hold_in_any_order_of_events() -> None:
    run_state_machine_as_test(ManyModels, settings=SETTINGS)
