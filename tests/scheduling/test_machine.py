"""Whatever happens in whatever order: the promises that the scheduler keeps, checked against a small model of the world.

The world here is what the registry would be: processes that exist, tickets that wait, leases that are held. It believes the
effects alone, and checks each one against what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.report import State
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.scheduler import Policy, Scheduler

from .driving import AT_ONCE, policy

POLICIES: dict[str, Policy] = {
    "plain": policy(keep_alive=5, concurrency=1, queue=3, drain_timeout=10),
    "wide": policy(keep_alive=0, concurrency=2, queue=2, drain_timeout=7),
    "kept": policy(keep_alive=-1, concurrency=1, queue=4, drain_timeout=3),
}
QUEUE = 5

MODELS = st.sampled_from(sorted(POLICIES))
PICK = st.integers(0, 1 << 16)

ALLOWED: dict[State, set[State]] = {
    "stopped": {"starting"},
    "failed": {"starting"},
    "backoff": {"starting"},
    "starting": {"ready", "stopping", "stuck", "failed"},
    "ready": {"draining", "stopping", "stuck", "failed"},
    "draining": {"stopping", "stuck", "failed", "stopped"},
    "stopping": {"stuck", "stopped", "failed"},
    "stuck": {"stopped", "failed"},
}


@dataclass
class Child:
    """A process that exists."""

    model: str
    generation: int
    ready: bool = False
    told: bool = False
    """Asked to stop."""
    failing: bool = False
    """Said that it is of no more use."""
    stuck: bool = False
    used: bool = False


@dataclass
class Ticket:
    kind: str
    model: str
    answered: bool = False
    left: bool = False


@dataclass
class World:
    children: dict[str, Child] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(POLICIES, 0))
    states: dict[str, State] = field(default_factory=lambda: dict.fromkeys(POLICIES, "stopped"))
    tickets: dict[int, Ticket] = field(default_factory=dict)
    leases: dict[int, Child] = field(default_factory=dict)
    drain_from: dict[str, float] = field(default_factory=dict)
    closed: bool = False

    def held(self, child: Child) -> list[int]:
        return [ticket for ticket, holder in self.leases.items() if holder is child]

    def waiting(self, model: str, *kinds: str) -> list[int]:
        return [
            number
            for number, ticket in self.tickets.items()
            if ticket.model == model and ticket.kind in kinds and not ticket.answered and not ticket.left
        ]


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(POLICIES, QUEUE, AT_ONCE)
        self.world = World()
        self.now = 1000.0
        self.closing = False

    # Telling the scheduler, and believing what it decides

    def tell(self, event: ev.Event) -> None:
        for effect in self.scheduler.handle(event, self.now):
            self.check(event, effect)

    def check(self, event: ev.Event, effect: fx.Effect) -> None:
        assert not self.world.closed or isinstance(effect, fx.Reject | fx.Done), "after Closed only answers"
        match effect:
            case fx.Spawn():
                self.on_spawn(effect)
            case fx.Stop():
                self.on_stop(event, effect)
            case fx.Grant():
                self.on_grant(effect)
            case fx.Done():
                self.on_done(effect)
            case fx.Reject():
                ticket = self.answer(effect.ticket)
                assert ticket.kind != "unload", "an unload cannot be refused"
            case fx.Changed():
                assert self.world.states[effect.model] == effect.previous
                assert effect.state in ALLOWED[effect.previous], f"{effect.previous} to {effect.state}"
                self.world.states[effect.model] = effect.state
            case fx.Closed():
                assert self.closing
                assert not self.world.children, "closed with living processes"
                assert not any(self.world.waiting(model, "acquire", "load", "unload") for model in POLICIES)
                self.world.closed = True

    def on_spawn(self, spawn: fx.Spawn) -> None:
        assert not self.closing
        assert spawn.model not in self.world.children, "two processes of one model"
        assert spawn.generation > self.world.generations[spawn.model]
        self.world.generations[spawn.model] = spawn.generation
        self.world.children[spawn.model] = Child(spawn.model, spawn.generation)

    def on_stop(self, event: ev.Event, stop: fx.Stop) -> None:
        child = self.world.children[stop.model]
        assert child.generation == stop.generation
        assert not child.told, "stopped twice"
        child.told = True
        if self.world.held(child):
            forced = isinstance(event, ev.Unload | ev.Shutdown) and event.force
            since = self.world.drain_from.get(stop.model)
            overdue = since is not None and self.now >= since + POLICIES[stop.model].drain_timeout
            assert forced or overdue, "a leased process was stopped"

    def on_grant(self, grant: fx.Grant) -> None:
        first = self.world.waiting(grant.model, "acquire")[0]
        assert grant.ticket == first, "served out of turn"
        ticket = self.answer(grant.ticket)
        assert (ticket.kind, ticket.model) == ("acquire", grant.model)
        child = self.world.children[grant.model]
        assert child.generation == grant.generation
        assert child.ready
        assert not child.told
        assert not child.failing
        self.world.leases[grant.ticket] = child
        child.used = True
        assert len(self.world.held(child)) <= POLICIES[grant.model].concurrency

    def on_done(self, done: fx.Done) -> None:
        ticket = self.answer(done.ticket)
        if ticket.kind == "load":
            assert self.world.children[ticket.model].ready
        else:
            assert ticket.kind == "unload"
            assert ticket.model not in self.world.children, "said to be unloaded, and lives"

    def answer(self, number: int) -> Ticket:
        ticket = self.world.tickets[number]
        assert not ticket.answered, "answered twice"
        assert not ticket.left, "answered after it left"
        ticket.answered = True
        return ticket

    def open_ticket(self, kind: str, model: str) -> int:
        number = len(self.world.tickets) + 1
        self.world.tickets[number] = Ticket(kind, model)
        return number

    def note_drain(self, model: str) -> None:
        child = self.world.children.get(model)
        if child is not None and child.ready and not child.told and not child.failing:
            self.world.drain_from.setdefault(model, self.now)

    def end(self, child: Child) -> None:
        """The process is gone, and with it what was held on it."""
        del self.world.children[child.model]
        self.world.drain_from.pop(child.model, None)
        for ticket in self.world.held(child):
            del self.world.leases[ticket]

    # Callers

    @rule(model=MODELS)
    def acquire(self, model: str) -> None:
        waiting = [number for each in POLICIES for number in self.world.waiting(each, "acquire", "load")]
        number = self.open_ticket("acquire", model)
        self.tell(ev.Acquire(number, model))
        if not self.closing and len(waiting) < QUEUE and len(self.world.waiting(model, "acquire", "load")) == 0:
            ticket = self.world.tickets[number]
            stuck = self.world.states[model] == "stuck"
            assert stuck or number in self.world.leases or not ticket.answered, "refused for no reason"

    @rule(model=MODELS)
    def load(self, model: str) -> None:
        self.tell(ev.Load(self.open_ticket("load", model), model))

    @rule(model=MODELS, force=st.booleans())
    def unload(self, model: str, force: bool) -> None:
        number = self.open_ticket("unload", model)
        self.note_drain(model)
        self.tell(ev.Unload(number, model, force))
        assert self.world.waiting(model, "acquire", "load") == [], "what waited was not called off"

    @precondition(lambda self: self.world.tickets)
    @rule(pick=PICK)
    def leave(self, pick: int) -> None:
        """Any caller leaves: in the queue, with a lease it may not have seen yet, or long after its answer."""
        number = 1 + pick % len(self.world.tickets)
        ticket = self.world.tickets[number]
        ticket.left = True
        self.world.leases.pop(number, None)
        self.tell(ev.Cancel(number, ticket.model))

    @precondition(lambda self: self.world.leases)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        number = sorted(self.world.leases)[pick % len(self.world.leases)]
        del self.world.leases[number]
        self.tell(ev.Release(number, self.world.tickets[number].model))

    @precondition(lambda self: self.world.tickets)
    @rule(pick=PICK)
    def release_late(self, pick: int) -> None:
        """A release of what is not held any more, or never was."""
        number = 1 + pick % len(self.world.tickets)
        if number not in self.world.leases:
            self.tell(ev.Release(number, self.world.tickets[number].model))

    # Runners

    def child(self, pick: int) -> Child:
        return list(self.world.children.values())[pick % len(self.world.children)]

    @precondition(lambda self: self.world.children)
    @rule(pick=PICK)
    def becomes_ready(self, pick: int) -> None:
        """Also just after it was told to stop: the two cross."""
        child = self.child(pick)
        if not (child.ready or child.failing or child.stuck):
            child.ready = not child.told
            self.tell(ev.Ready(child.model, child.generation))

    @precondition(lambda self: self.world.children)
    @rule(pick=PICK)
    def is_failing(self, pick: int) -> None:
        child = self.child(pick)
        if not child.failing:
            child.failing = True
            self.tell(ev.Failing(child.model, child.generation, LoadFailed("it failed")))

    @precondition(lambda self: self.world.children)
    @rule(pick=PICK)
    def dies(self, pick: int) -> None:
        child = self.child(pick)
        was_starting = self.world.states[child.model] == "starting"
        waiting = self.world.waiting(child.model, "acquire", "load")
        self.end(child)
        self.tell(ev.Gone(child.model, child.generation, RunnerDied("it died")))
        if was_starting:
            assert child.model not in self.world.children, "a failed load was tried again at once"
            assert all(self.world.tickets[number].answered for number in waiting)

    @precondition(lambda self: any(child.told for child in self.world.children.values()))
    @rule(pick=PICK)
    def obeys(self, pick: int) -> None:
        told = [child for child in self.world.children.values() if child.told]
        child = told[pick % len(told)]
        self.end(child)
        self.tell(ev.Gone(child.model, child.generation))

    @precondition(lambda self: self.world.children)
    @rule(pick=PICK)
    def is_stuck(self, pick: int) -> None:
        child = self.child(pick)
        child.stuck = True
        self.world.drain_from.pop(child.model, None)
        self.tell(ev.Stuck(child.model, child.generation, [1]))

    @rule(model=MODELS, pick=PICK, kind=st.sampled_from(["ready", "gone", "died", "failing", "stuck"]))
    def old_news(self, model: str, pick: int, kind: str) -> None:
        """Something of a former generation arrives late, and changes nothing."""
        latest = self.world.generations[model]
        old = pick % latest if model in self.world.children and latest else latest
        before = self.scheduler.view(model)
        events: dict[str, ev.Event] = {
            "ready": ev.Ready(model, old),
            "gone": ev.Gone(model, old),
            "died": ev.Gone(model, old, RunnerDied("late")),
            "failing": ev.Failing(model, old, LoadFailed("late")),
            "stuck": ev.Stuck(model, old, [1]),
        }
        assert self.scheduler.handle(events[kind], self.now) == []
        assert self.scheduler.view(model) == before

    # Time, and the end

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 5.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.scheduler.wake_at()) is not None and due <= end:
            self.now = max(self.now, due)
            self.tick()
        self.now = end

    @rule()
    def tick(self) -> None:
        """Also when none is due."""
        self.tell(ev.Tick())
        due = self.scheduler.wake_at()
        assert due is None or due > self.now, "the next Tick is due at once, and the one after it"

    @rule(force=st.booleans(), really=st.integers(0, 9))
    def shut_down(self, force: bool, really: int) -> None:
        if really:  # seldom, or there would be little else
            return
        self.closing = True
        for model in POLICIES:
            self.note_drain(model)
        self.tell(ev.Shutdown(force=force))

    # What is true at any time

    @invariant()
    def the_scheduler_sees_the_world_as_it_is(self) -> None:
        assert self.scheduler.closing == self.closing
        for model in POLICIES:
            view = self.scheduler.view(model)
            child = self.world.children.get(model)
            assert view.state == self.world.states[model]
            assert view.generation == self.world.generations[model]
            assert (child is None) == (view.state in ("stopped", "failed", "backoff"))
            if child is not None:
                assert view.leases == len(self.world.held(child))
                assert view.state not in ("ready", "draining") or (child.ready and not child.told)
                assert view.state != "draining" or view.leases
            assert view.waiting == len(self.world.waiting(model, "acquire", "load"))

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        for model, of_model in POLICIES.items():
            view = self.scheduler.view(model)
            if self.world.waiting(model, "acquire", "load"):
                assert not self.closing
                assert model in self.world.children
                assert view.state != "ready" or view.leases == of_model.concurrency
            if self.world.waiting(model, "unload"):
                assert model in self.world.children

    @invariant()
    def no_more_wait_than_may(self) -> None:
        waiting = {model: len(self.world.waiting(model, "acquire", "load")) for model in POLICIES}
        assert sum(waiting.values()) == self.scheduler._waiting <= QUEUE
        assert all(count <= POLICIES[model].queue for model, count in waiting.items())

    @invariant()
    def an_idle_model_has_its_time(self) -> None:
        for model, of_model in POLICIES.items():
            view = self.scheduler.view(model)
            idle = view.state == "ready" and not view.leases and of_model.keep_alive >= 0
            assert (view.expires is not None) == (idle and of_model.keep_alive > 0)
            assert not idle or of_model.keep_alive > 0 or not self.world.children[model].used, "its use is over"
            if view.expires is not None:
                assert view.expires <= self.now + of_model.keep_alive

    @invariant()
    def closed_when_nothing_lives(self) -> None:
        assert self.world.closed == (self.closing and not self.world.children)

    def teardown(self) -> None:
        """From wherever it is: once leases end and processes obey, everybody is served, and a shutdown ends everything."""
        for _ in range(200):
            if not self.step():
                break
        else:
            raise AssertionError("no end in sight")
        for model in POLICIES:
            assert self.world.waiting(model, "acquire", "load", "unload") == [], "somebody still waits"
        self.closing = True
        self.tell(ev.Shutdown())
        while self.world.children:
            assert self.step(), "something lives and nothing is done about it"
        assert self.world.closed

    def step(self) -> bool:
        """Let one thing happen that must happen sooner or later; False when there is none."""
        if self.world.leases:
            self.release(0)
            return True
        for child in self.world.children.values():
            if child.told or child.stuck or child.failing:
                self.end(child)
                self.tell(ev.Gone(child.model, child.generation))
                return True
            if not child.ready:
                child.ready = True
                self.tell(ev.Ready(child.model, child.generation))
                return True
        return False


SETTINGS = hypothesis.settings(
    max_examples=100,
    stateful_step_count=50,
    report_multiple_bugs=False,
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
)


@pytest.mark.timeout(120)  # takes a few seconds; a failure is made small before it is shown, which takes its time
def test_the_promises_hold_in_any_order_of_events() -> None:
    run_state_machine_as_test(Life, settings=SETTINGS)
