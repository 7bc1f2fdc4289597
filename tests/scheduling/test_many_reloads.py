"""Many models whose configuration changes under way: nothing is lost by it, and who shall come back by itself does.

The world and its promises are those of `test_many`. Here it also keeps a list of who is owed a load that nobody asks for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.scheduler import Policy

from .test_many import DEVICES, GIB, KEPT, MODELS, NAMES, SETTINGS, TOTAL, WEIGHT, ManyModels, Process

CHANGES = st.sampled_from(
    [
        {"pinned": True},
        {"pinned": False},
        {"comes_back": True},
        {"comes_back": False},
        {"preload": True},
        {"preload": False},
        {"priority": "high"},
        {"priority": "low"},
        {"memory": 1 * GIB},
        {"memory": 2 * GIB},
        {"memory": None},
        {"keep_alive": 0.0},
        {"keep_alive": 30.0},
        {"concurrency": 2},
    ]
)
LOADS_UNASKED = 3
"""So often a model may be loaded by itself in a long time without requests, in which no memory is wanted by others."""


class Reloads(ManyModels):
    def __init__(self) -> None:
        super().__init__()
        self.owed: dict[str, int] = {}
        """Who shall come back by itself, and what it held when it went."""
        self.put_out: set[str] = set()
        """Whose process goes because its memory is needed, or for another configuration of what is pinned."""
        self.unwanted: set[str] = set()
        """Whom somebody had unloaded."""
        self.unasked = Counter[str]()

    # What is owed

    def tell(self, event: ev.Event, *, forced: bool = False) -> None:
        crashed = isinstance(event, ev.Gone) and event.error is not None
        if isinstance(event, ev.Gone) and crashed and self.pins(event.model):
            self.owed[event.model] = 0
        super().tell(event, forced=forced)
        if isinstance(event, ev.Unload):
            view = self.scheduler.view(event.model) if event.model in self.scheduler.models else None
            process = self.processes.get(event.model)
            if view is None or process is None or process.told or view.state != "ready":
                self.owed.pop(event.model, None)
                self.put_out.discard(event.model)
                self.unwanted.add(event.model)

    def pins(self, model: str) -> bool:
        return self.policies[model].pinned and model not in self.unwanted and model in self.configured

    def check(self, effect: fx.Effect, event: ev.Event, *, forced: bool) -> None:
        super().check(effect, event, forced=forced)
        if isinstance(effect, fx.Forget):
            assert effect.model not in self.processes
            self.generations[effect.model] = 0
            self.questions.pop(effect.model, None)
            self.owed.pop(effect.model, None)
            self.unwanted.discard(effect.model)

    def on_spawn(self, spawn: fx.Spawn) -> None:
        super().on_spawn(spawn)
        self.owed.pop(spawn.model, None)
        self.put_out.discard(spawn.model)
        self.unwanted.discard(spawn.model)
        self.unasked[spawn.model] += 1

    def on_stop(self, stop: fx.Stop, event: ev.Event, *, forced: bool) -> None:
        super().on_stop(stop, event, forced=forced)
        if "put out" in self.scheduler.view(stop.model).reason:
            self.put_out.add(stop.model)

    def end(self, process: Process) -> None:
        super().end(process)
        model, policy = process.model, self.policies[process.model]
        if model in self.put_out and (policy.comes_back or policy.pinned):
            held = [max(share, process.uses.get(device, 0)) for device, share in process.shares.items()]
            self.owed[model] = sum(held)
        self.put_out.discard(model)

    # Another configuration

    def reconfigure(self, policies: dict[str, Policy], *restart: str) -> None:
        for name, policy in policies.items():
            if policy.pinned and not self.policies[name].pinned and name in self.processes:
                self.processes[name].excused = self.scheduler.view(name).state in ("draining", "stopping")
            if not (policy.pinned or policy.comes_back):
                self.owed.pop(name, None)
        self.policies.update(policies)
        self.tell(
            ev.Reconfigure(policies=policies, queue=12, limits=self.limits, devices=DEVICES, restart=frozenset(restart))
        )

    @property
    def configured(self) -> dict[str, Policy]:
        return {name: self.policies[name] for name in self.scheduler.models if name not in self.leaving}

    @property
    def leaving(self) -> set[str]:
        return {name for name in self.scheduler.models if self.scheduler._books[name].removed}

    @precondition(lambda self: not self.closing)
    @rule(model=NAMES, change=CHANGES)
    def changes(self, model: str, change: dict[str, Any]) -> None:
        policies = self.configured
        if model in policies:
            policies[model] = msgspec.structs.replace(policies[model], **change)
            if policies[model].pinned and self.scheduler.view(model).state in ("starting", "ready"):
                self.put_out.add(model)
            self.reconfigure(policies, model)
            assert self.scheduler.view(model).state != "ready", "it goes on as it was"

    @precondition(lambda self: not self.closing)
    @rule()
    def reads_again_what_it_knows(self) -> None:
        """Nothing has changed, and nothing does but for those that wait: who could go for them is looked for once more."""
        claims = {name: self.scheduler._books[name].claim for name in self.scheduler.models}
        before = {name: self.scheduler.view(name) for name in self.scheduler.models}
        self.reconfigure(self.configured)
        for name, view in before.items():
            if name in self.processes and not any(claims.values()):
                assert self.scheduler.view(name) == view
            assert claims[name] is None or self.scheduler._books[name].claim in (None, claims[name])
            if self.waiting(name, "acquire", "load"):
                assert name in self.processes or self.scheduler._books[name].claim is claims[name]

    @precondition(lambda self: not self.closing)
    @rule(model=NAMES)
    def comes_or_goes(self, model: str) -> None:
        policies = self.configured
        if policies.pop(model, None) is None:
            policies[model] = MODELS[model]
        self.reconfigure(policies)
        if model not in policies:
            assert self.waiting(model, "acquire", "load") == []

    # In the end

    def let_all_be_answered(self) -> None:
        self.nothing_goes_on_for_ever()
        super().let_all_be_answered()
        if self.closing:
            return
        self.unasked.clear()
        for _ in range(40):
            self.rest()
            self.time_passes(16.0)
        self.rest()
        for model, times in self.unasked.items():
            assert times <= LOADS_UNASKED, f"{model} was loaded {times} times by itself"
        if any(self.scheduler.view(model).claimed for model in self.scheduler.models):
            return
        for model, held in self.owed.items():
            assert not self.fits(model, held), f"{model} does not come back"

    def nothing_goes_on_for_ever(self) -> None:
        """In one moment only so much can happen, even if whatever is weighed turns out to be beyond help."""
        for _ in range(60):
            if not self.questions:
                return
            self.is_weighed(0, known=False)
        raise AssertionError("it is weighed again and again")

    def rest(self) -> None:
        """Let happen all that takes no time."""
        for _ in range(200):
            before = self.now
            if self.questions or self.leases or any(self.is_moving(each) for each in self.processes.values()):
                self.step()
                assert self.now == before
            else:
                return
        raise AssertionError("no end in sight")

    @staticmethod
    def is_moving(process: Process) -> bool:
        return process.told or process.failing or not process.ready

    def fits(self, model: str, held: int) -> bool:
        policy = self.policies[model]
        if self.limits.max_loaded and len(self.processes) >= self.limits.max_loaded:
            return False
        need = max(held, WEIGHT if policy.memory is None else policy.memory)
        free = {
            device: total
            - KEPT
            - sum(max(each.shares.get(device, 0), each.uses.get(device, 0)) for each in self.processes.values())
            for device, total in TOTAL.items()
        }
        return any(need <= free[device] for device in policy.devices)


@pytest.mark.timeout(400)  # a failure is made small before it is shown
def test_the_promises_hold_whatever_the_configuration_becomes() -> None:
    run_state_machine_as_test(Reloads, settings=hypothesis.settings(SETTINGS, max_examples=300))
