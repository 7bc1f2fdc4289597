"""What `explain` says is what a request gets: held against a real request to a copy, whatever state things are in."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence

import hypothesis
import msgspec
import pytest
from hypothesis.stateful import run_state_machine_as_test

from mlxsup.errors import LoadFailed
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Scheduler

from .driving import GIB, Short, broken, granted, model, only, rejected, spawned, stopped
from .test_many import SETTINGS, WEIGHT
from .test_many_reloads import Reloads

TICKET = 10**6


class Foreseen(Reloads):
    """Asks after each event what would become of a request for one model, the next one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.ends = False

    def tell(self, event: ev.Event, *, forced: bool = False) -> None:
        super().tell(event, forced=forced)
        self.turn += 1
        models = self.scheduler.models
        if models and not self.ends:
            name = models[self.turn % len(models)]
            unfit = ev.Unfit(name, 0, LoadFailed("no such file"))
            self.foresee(name, ev.Weighed(name, 0, WEIGHT) if self.turn % 3 else unfit)

    def teardown(self) -> None:
        self.ends = True
        super().teardown()

    def foresee(self, name: str, weighed: ev.Weighed | ev.Unfit) -> None:
        before = pickle.dumps(self.scheduler)
        real = self.scheduler.copy()
        said = self.scheduler.explain(name, self.now, weighed)
        assert pickle.dumps(self.scheduler) == before, "to explain changes nothing"
        were = {each: real.view(each).state for each in real.models}
        effects = ask(real, name, self.now, weighed)
        if rejected(effects).get(TICKET):
            (answer,) = [each for each in only(effects, fx.Reject) if each.ticket == TICKET]
            assert said == f"refused: {answer.error.message}"
        elif TICKET in granted(effects):
            assert said.startswith("granted at once")
        elif name in spawned(effects):
            assert said.startswith("loaded at once")
        elif victims := put_out_for(name, effects):
            assert said.startswith("loaded after these are put out: ")
            assert all(f"{victim} (credit" in said for victim in victims)
        elif said.startswith("queued: in "):
            self.comes_to_it(real, name, said)
        elif said.startswith("loaded when those who go"):
            self.needs_no_more(real, name, said)
        else:
            assert said.startswith(("queued", "loaded when the memory"))
            if behind := re.match(r"queued behind ([\w, ]+),", said):
                assert all(real.view(each).claimed for each in behind[1].split(", "))
            if "it is on its way out" in said:
                assert were[name] in ("draining", "stopping")

    def comes_to_it(self, real: Scheduler, name: str, said: str) -> None:
        """It was told who goes when; and so it is, if nothing else happens."""
        found = re.match(r"queued: in ([\d.]+) s ([\w, ]+) will have been loaded", said)
        assert found is not None
        end = self.now + float(found[1]) + 0.1
        effects: list[fx.Effect] = []
        while (due := real.wake_at()) is not None and due <= end and not put_out_for(name, effects):
            effects = real.handle(ev.Tick(), due)
        assert put_out_for(name, effects) == found[2].split(", ")

    def needs_no_more(self, real: Scheduler, name: str, said: str) -> None:
        """It was told who goes already: when all of these are gone it is loaded, but for those who come before it."""
        found = re.match(r"loaded when those who go are gone \(([\w, ]+)\)", said)
        assert found is not None
        going = found[1].split(", ")
        assert all(real.view(each).state in ("draining", "stopping") for each in going)
        if self.watched or any(real.view(each).leases or each not in self.processes for each in going):
            return  # the system shows their memory later, or they have work to end first
        if "to be loaded again" in said:
            return  # and whoever asked for that may have come earlier
        loaded: list[str] = []
        for each in going:
            loaded += spawned(real.handle(ev.Gone(each, real.view(each).generation), self.now))
        assert name in loaded


def ask(scheduler: Scheduler, name: str, now: float, weighed: ev.Weighed | ev.Unfit) -> list[fx.Effect]:
    """Ask for a model as a caller would, and answer the question for its need."""
    effects = list(scheduler.handle(ev.Acquire(TICKET, name), now))
    if scheduler.view(name).weighing:
        answer = msgspec.structs.replace(weighed, attempt=scheduler._books[name].attempt)
        effects += scheduler.handle(answer, now)
    return effects


def put_out_for(name: str, effects: Sequence[fx.Effect]) -> list[str]:
    """Who begins to go for a model."""
    return [
        each.model
        for each in only(effects, fx.Changed)
        if each.previous == "ready" and each.reason.startswith(f"put out for {name}: ")
    ]


@pytest.mark.timeout(400)  # a failure is made small before it is shown
def test_what_is_said_is_what_happens() -> None:
    run_state_machine_as_test(Foreseen, settings=hypothesis.settings(SETTINGS, max_examples=100))


class TestWords:
    def test_who_comes_to_a_full_queue_is_refused(self) -> None:
        driver = Short(2, a=model(1, queue=1))
        driver.leased("a")
        driver.acquire("a")
        said = driver.explained("a")
        assert said == "refused: 1 requests wait already, as many as may for a"
        assert list(rejected(driver.acquire("a")[1]).values()) == ["queue_full"]

    def test_memory_that_belongs_to_another_first_is_told_apart_from_free_memory(self) -> None:
        driver = Short(3, big=model(3), a=model(1, concurrency=5), s=model(1))
        driver.leased("a")
        driver.acquire("big")
        driver.after(16)
        said = driver.explained("s")
        assert said == "queued behind big, to whom memory goes first: s needs 1.0 GiB on cpu, 2.0 GiB are free"
        assert spawned(driver.acquire("s")[1]) == []

    def test_who_comes_first_to_what_begins_to_go_just_now_is_named(self) -> None:
        driver = Short(4, x=model(3), b=model(2, priority="high"), c=model(3))
        driver.leased("x")
        driver.acquire("b")
        driver.acquire("c")
        driver.failing(broken(), "x")
        assert driver.explained("c").startswith("queued behind b, to whom memory goes first")
        assert spawned(driver.gone(broken(), "x")) == ["b"]

    def test_who_came_just_now_is_named_with_the_time_until_it_may_go(self) -> None:
        driver = Short(1, Limits(min_residency=5.0), a=model(1), b=model(1))
        driver.loaded("a")
        driver.after(2)
        said = driver.explained("b")
        assert said.startswith("queued: in 3.0 s a will have been loaded for 5 s and may be put out; b needs 1.0 GiB")
        driver.acquire("b")
        assert stopped(driver.after(3)) == ["a"]

    def test_who_is_in_the_way_is_named_with_the_reason(self) -> None:
        driver = Short(4, a=model(1), b=model(1), c=model(1, pinned=True), d=model(1), e=model(2))
        driver.leased("a")
        driver.load("b")
        driver.loaded("c")
        said = driver.explained("e")
        assert said == (
            "queued until there is room: e needs 2.0 GiB on cpu, 1.0 GiB are free;"
            " a is in use, b is being loaded, c is pinned"
        )

    def test_of_many_in_the_way_the_first_are_named(self) -> None:
        m = model(1)
        driver = Short(7, late=m, m0=m, m1=m, m2=m, m3=m, m4=m, m5=m, m6=m)
        for number in range(7):
            driver.leased(f"m{number}")
        said = driver.explained("late")
        assert said.endswith("m3 is in use, m4 is in use and 2 more")

    def test_who_goes_already_is_named(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.loaded("a")
        driver.unload("a")
        said = driver.explained("b")
        assert said.startswith("loaded when those who go are gone (a): b needs 1.0 GiB on cpu, 0 B are free")
        assert driver.explained("a") == ("queued, and loaded again: it is on its way out (unload asked for)")

    def test_memory_that_the_system_has_not_shown_yet_is_waited_for(self) -> None:
        driver = Short(2, a=model(2), b=model(2))
        driver.sampled(2)
        driver.loaded("a")
        driver.sampled(0, a=2)
        driver.unload("a")
        driver.gone(model="a")
        said = driver.explained("b")
        assert said.startswith("loaded when the memory of who went is back: b needs 2.0 GiB on cpu, 0 B are free")
        assert spawned(driver.acquire("b")[1]) == []
        assert spawned(driver.sampled(2)) == ["b"]

    def test_places_in_use_and_loads_under_way_are_told_with_those_who_wait_before(self) -> None:
        driver = Short(2, a=model(1))
        driver.acquire("a")
        assert driver.explained("a") == "queued: it is being loaded, 1 wait before it"
        driver.ready("a")
        assert driver.explained("a") == "queued: all 1 of its places are taken, 0 wait before it"

    def test_what_was_weighed_just_now_counts(self) -> None:
        driver = Short(2, a=model(memory=None))
        said = driver.scheduler.explain("a", driver.now, ev.Weighed("a", 0, 3 * GIB))
        assert said.startswith("refused: model requires 3.0 GiB but only 2.0 GiB are available")
        said = driver.scheduler.explain("a", driver.now, ev.Unfit("a", 0, broken()))
        assert said == "refused: no such file"
        assert driver.view("a").state == "stopped"

    def test_who_will_make_do_with_less_is_told_so(self) -> None:
        driver = Short(8, a=model(memory=None))
        driver.sampled(5)
        weighed = ev.Weighed("a", 0, 7 * GIB, least=4 * GIB, source="learnt from its loads")
        said = driver.scheduler.explain("a", driver.now, weighed)
        assert said.startswith(
            "queued: if no memory is given back in 15.0 s, 4.8 GiB must do; then loaded (model requires"
        )
        driver.acquire("a")
        driver.tell(msgspec.structs.replace(weighed, attempt=1))
        driver.after(5)
        assert driver.explained("a").startswith("queued: if no memory is given back in 10.0 s, 4.8 GiB must do; then ")
        assert spawned(driver.after(10)) == ["a"]

    def test_who_will_make_do_with_less_and_has_others_put_out_for_it(self) -> None:
        driver = Short(8, a=model(memory=None), b=model(2), c=model(1))
        driver.sampled(8)
        driver.loaded("b")
        driver.leased("c")
        driver.sampled(3, b=2, c=1)
        weighed = ev.Weighed("a", 0, 7 * GIB, least=3 * GIB)
        said = driver.scheduler.explain("a", driver.now, weighed)
        assert "5.7 GiB must do; then loaded after these are put out: b (credit" in said
        assert "; c (credit" in said
        driver.acquire("a")
        driver.tell(msgspec.structs.replace(weighed, attempt=1))
        found = driver.after(15)
        assert stopped(found) == ["b"]
        assert driver.state("c") == "draining"

    def test_who_cannot_make_do_is_refused(self) -> None:
        driver = Short(8, a=model(memory=None))
        driver.sampled(5)
        weighed = ev.Weighed("a", 0, 7 * GIB, least=6 * GIB)
        said = driver.scheduler.explain("a", driver.now, weighed)
        assert said.startswith(
            "queued for a moment, then refused: model requires 7.0 GiB but only 5.0 GiB are available"
        )

    def test_a_shutdown_refuses(self) -> None:
        driver = Short(2, a=model(1))
        driver.tell(ev.Shutdown())
        assert driver.explained("a") == "refused: mlxsup is shutting down"

    def test_too_many_places_are_told_as_such(self) -> None:
        driver = Short(3, a=model(1), b=model(1))
        lease = driver.leased("a")
        driver.loaded("b")
        policies = {"a": model(1), "b": model(1)}
        devices = (Device(name="cpu", total=3 * GIB),)
        limits = Limits(max_loaded=1)
        driver.tell(ev.Reconfigure(policies=policies, queue=10, limits=limits, devices=devices))
        driver.sampled(3)
        assert driver.view("b").reason.startswith("put out because 2 are loaded and max_loaded is 1; credit ")
        driver.gone(model="b")
        driver.acquire("b")
        said = driver.explained("b")
        assert "1 of 1 places are taken (max_loaded)" in said
        driver.release(lease, "a")

    def test_too_many_places_in_use_are_told_as_such(self) -> None:
        driver = Short(3, a=model(1), b=model(1))
        driver.leased("a")
        driver.leased("b")
        policies = {"a": model(1), "b": model(1)}
        devices = (Device(name="cpu", total=3 * GIB),)
        driver.tell(ev.Reconfigure(policies=policies, queue=10, limits=Limits(max_loaded=1), devices=devices))
        (told,) = only(driver.sampled(3), fx.Noticed)
        assert told.reason == (
            "2 are loaded and max_loaded is 1, and no idle model can be put out: nothing more is loaded"
        )

    def test_the_last_reason_is_told_where_one_failure_follows_another(self) -> None:
        driver = Short(3, a=model(memory=None))
        driver.acquire("a")
        driver.tell(ev.Unfit("a", 1, LoadFailed("file X is missing")))
        driver.acquire("a")
        found = driver.tell(ev.Unfit("a", 2, LoadFailed("file Y is garbage")))
        assert driver.view("a").reason == "file Y is garbage"
        assert [each.reason for each in only(found, fx.Noticed)] == ["file Y is garbage"]
        driver.acquire("a")
        assert only(driver.tell(ev.Unfit("a", 3, LoadFailed("file Y is garbage"))), fx.Noticed) == []


def test_one_whose_shortage_ends_behind_another_that_waits_in_vain_makes_do() -> None:
    """What a shorter patience ends is looked at, though there is no memory for one before it that asks for less."""
    policies = {"x": model(4), "a": model(7), "b": model(memory=None)}
    driver = Short(10, Limits(), (), **policies)
    driver.leased("x")
    driver.sampled(6, x=4)
    driver.acquire("a")
    driver.acquire("b")
    driver.tell(ev.Weighed("b", 1, 9 * GIB, 0.0, 5 * GIB))
    driver.sampled(4, x=4)  # other programs took the rest
    devices = (Device(name="cpu", total=10 * GIB),)
    driver.tell(ev.Reconfigure(policies=policies, queue=100, limits=Limits(patience=1.0), devices=devices))
    driver.after(1.1)
    assert "b needs 7.6 GiB" in driver.explained("b")
