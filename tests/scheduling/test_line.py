"""Those who wait: who is looked at and in which order, when it is looked again, who leaves, and what was wished meanwhile."""

from __future__ import annotations

import pytest

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.admission import Plan
from mlxsup.scheduling.backoff import Backoff
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, ModelView, Policy, Scheduler

from .driving import GIB, Driver, Short, broken, changes, done, granted, model, only, rejected, spawned, stopped


def queued(queue: int, **policies: Policy) -> Driver:
    """A driver with memory for everything, where so many may wait."""
    driver = Driver()
    driver.scheduler = Scheduler(policies, queue)
    return driver


class TestLine:
    def test_who_leaves_lets_in_who_was_held_back_for_it(self) -> None:
        driver = Short(3, Limits(patience=15), busy=model(2), large=model(3), small=model(1))
        driver.leased("busy")
        large, _ = driver.acquire("large")
        driver.after(15)
        assert spawned(driver.acquire("small")[1]) == []
        assert spawned(driver.cancel(large, "large")) == ["small"]

    def test_another_request_does_not_begin_the_wait_anew(self) -> None:
        driver = Short(1, Limits(patience=15), busy=model(1), other=model(1))
        driver.leased("busy")
        driver.acquire("other")
        driver.after(10)
        driver.acquire("other")
        assert changes(driver.after(5)) == [("ready", "draining")]

    def test_a_claim_lasts_as_long_as_one_of_those_who_wait_for_it(self) -> None:
        driver = Short(1, busy=model(1), other=model(1))
        lease = driver.leased("busy")
        asking, _ = driver.acquire("other")
        loading, _ = driver.load("other")
        driver.cancel(asking, "other")
        assert driver.view("other").claimed
        driver.release(lease, "busy")
        driver.gone(model="busy")
        assert done(driver.ready("other")) == [loading]

    def test_the_first_who_came_decides_where_a_model_stands(self) -> None:
        driver = Short(1, busy=model(1), a=model(1), b=model(1))
        lease = driver.leased("busy")
        asking, _ = driver.acquire("a")
        driver.after(1)
        driver.acquire("b")
        driver.after(1)
        driver.acquire("a")
        driver.cancel(asking, "a")
        driver.release(lease, "busy")
        assert spawned(driver.gone(model="busy")) == ["a"]

    def test_who_came_while_it_went_stands_where_it_came(self) -> None:
        driver = Short(1, a=model(1), b=model(1), c=model(1))
        driver.leased("a")
        driver.acquire("c")
        driver.after(1)
        driver.unload("a", force=True)
        driver.load("a")
        driver.after(1)
        driver.acquire("b")
        assert spawned(driver.gone(model="a")) == ["c"]
        driver.unload("c")
        assert spawned(driver.gone(model="c")) == ["a"]

    def test_only_one_is_drained_where_one_is_enough(self) -> None:
        driver = Short(2, Limits(patience=15), a=model(1), b=model(1), other=model(1))
        driver.leased("a")
        driver.leased("b")
        driver.acquire("other")
        assert len(changes(driver.after(15))) == 1
        driver.sampled(2)
        assert sorted([driver.state("a"), driver.state("b")]) == ["draining", "ready"]

    def test_a_victim_that_does_not_go_is_counted_on_no_more(self) -> None:
        driver = Short(2, a=model(1), b=model(1), other=model(1))
        driver.loaded("a")
        driver.loaded("b")
        driver.acquire("other")
        assert driver.state("a") == "stopping"
        assert stopped(driver.stuck("a")) == ["b"]
        assert spawned(driver.gone(model="b")) == ["other"]

    def test_as_many_as_fit_are_loaded_in_one_go(self) -> None:
        driver = Short(2, busy=model(2), a=model(1), b=model(1))
        lease = driver.leased("busy")
        driver.acquire("a")
        driver.acquire("b")
        driver.release(lease, "busy")
        assert spawned(driver.gone(model="busy")) == ["a", "b"]

    def test_a_small_one_passes_a_large_one_that_nobody_goes_for(self) -> None:
        driver = Short(3, busy=model(2), large=model(3), small=model(1))
        driver.leased("busy")
        driver.acquire("large")
        assert spawned(driver.acquire("small")[1]) == ["small"]

    def test_a_refusal_is_one_change_however_often_it_is_said(self) -> None:
        driver = Short(1, a=model(2))
        driver.acquire("a")
        assert driver.state("a") == "failed"
        driver.after(1)
        ticket, found = driver.acquire("a")
        assert rejected(found) == {ticket: "does_not_fit"}
        assert changes(found) == []

    def test_fifty_that_need_the_same_are_planned_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A decision takes as long as there are kinds of need, not as there are models."""
        names = [f"m{number}" for number in range(50)]
        policies = {name: model(1) for name in ["busy", *names]} | {"smaller": model(0.5)}
        policies |= {name: model(1, devices=("gpu",)) for name in ("hot", "other")}
        driver = Driver()
        driver.scheduler = Scheduler(policies, 100, devices=[Device(name=name, total=GIB) for name in ("cpu", "gpu")])
        driver.leased("busy")
        driver.leased("hot")
        for name in [*names, "other", "smaller"]:
            driver.acquire(name)
        planned: list[str] = []
        plan = driver.scheduler._admission.plan

        def counting(book: object, *arguments: object, **named: object) -> Plan:
            planned.append(book.name)  # type: ignore[attr-defined]
            return plan(book, *arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(driver.scheduler._admission, "plan", counting)
        driver.tell(ev.Sampled({}, {}))
        assert planned == ["m0", "other", "smaller"]


class TestMemoryThatComesBack:
    LIMITS = Limits(settle=5.0, look=0.1)

    def leaving(self) -> Short:
        """A process is gone, and the system shows its memory as taken still."""
        driver = Short(3, self.LIMITS, a=model(2), b=model(2), c=model(1))
        driver.sampled(3)
        driver.loaded("a")
        driver.sampled(1, a=2)
        driver.unload("a")
        driver.gone(model="a")
        return driver

    def test_where_nobody_waits_nobody_looks(self) -> None:
        assert self.leaving().scheduler.wake_at() is None

    def test_who_comes_meanwhile_has_it_looked_for(self) -> None:
        driver = self.leaving()
        driver.after(1)
        assert spawned(driver.acquire("b")[1]) == []
        assert driver.scheduler.wake_at() == driver.now + 0.1
        assert only(driver.after(0.1), fx.Look) == [fx.Look()]
        assert driver.scheduler.wake_at() == driver.now + 0.1
        assert spawned(driver.sampled(3)) == ["b"]

    def test_it_is_looked_for_ten_times_a_second_and_no_longer_than_it_is_expected(self) -> None:
        driver = self.leaving()
        driver.acquire("b")
        assert len(only(driver.after(4.95), fx.Look)) == 49
        assert len(only(driver.after(9), fx.Look)) <= 1

    def test_who_finds_room_beside_it_does_not_wait(self) -> None:
        assert spawned(self.leaving().acquire("c")[1]) == ["c"]

    def test_nobody_is_put_out_for_who_only_has_to_wait(self) -> None:
        driver = Short(4, self.LIMITS, a=model(2), b=model(2), c=model(1))
        driver.sampled(4)
        driver.loaded("a")
        driver.loaded("c")
        driver.sampled(1, a=2, c=1)
        driver.unload("a")
        driver.gone(model="a")
        assert stopped(driver.acquire("b")[1]) == []
        assert spawned(driver.sampled(3, c=1)) == ["b"]


class TestUnasked:
    """What is loaded though nobody asks for it."""

    def test_preloads_are_weighed_and_loaded_in_the_order_of_their_priority(self) -> None:
        driver = Short(
            1,
            last=model(1, preload=True, priority="low"),
            first=model(memory=None, preload=True, priority="high"),
            second=model(memory=None, preload=True),
        )
        found = driver.tell(ev.Start())
        assert found == [fx.Weigh("first", 1), fx.Weigh("second", 1)]
        assert driver.tell(ev.Weighed("second", 1, GIB)) == []
        assert spawned(driver.tell(ev.Weighed("first", 1, GIB))) == ["first"]

    def test_who_asks_does_not_wait_for_a_preload_that_is_being_weighed(self) -> None:
        driver = Short(1, a=model(memory=None, preload=True, priority="high"), b=model(1))
        driver.tell(ev.Start())
        assert spawned(driver.acquire("b")[1]) == ["b"]

    def test_a_preload_is_no_request(self) -> None:
        driver = Short(1, a=model(memory=None, preload=True))
        driver.tell(ev.Start())
        view = driver.view("a")
        assert (view.claimed, view.weighing, view.wanted, view.waiting) == (True, True, True, 0)
        driver.acquire("a")
        view = driver.view("a")
        assert (view.claimed, view.weighing, view.wanted, view.waiting) == (True, True, False, 1)

    def test_those_who_went_come_back_in_the_order_of_their_priority(self) -> None:
        driver = Short(
            2, a=model(1, comes_back=True, priority="low"), b=model(1, comes_back=True, priority="high"), guest=model(2)
        )
        driver.loaded("a")
        driver.loaded("b")
        driver.load("guest")
        driver.gone(model="a")
        driver.gone(model="b")
        driver.ready("guest")
        driver.unload("guest")
        assert spawned(driver.gone(model="guest")) == ["b", "a"]

    def test_who_comes_back_puts_nobody_out(self) -> None:
        driver = Short(2, home=model(2, comes_back=True), guest=model(1), other=model(1))
        driver.loaded("home")
        driver.load("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.loaded("other")
        driver.unload("guest")
        found = driver.gone(model="guest")
        assert (spawned(found), stopped(found)) == ([], [])

    @pytest.mark.parametrize("times", [1, 2])
    def test_who_went_for_no_other_does_not_come_back(self, times: int) -> None:
        driver = Short(1, a=model(1, comes_back=True, keep_alive=5.0))
        for _ in range(times):
            driver.loaded("a")
            driver.after(5)
            assert spawned(driver.gone(model="a")) == []

    def test_who_was_asked_for_meanwhile_is_not_to_come_back_any_more(self) -> None:
        driver = Short(1, home=model(1, comes_back=True, keep_alive=5.0), guest=model(1))
        driver.loaded("home")
        driver.load("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.load("home")
        driver.gone(model="guest")
        driver.ready("home")
        driver.after(5)
        assert spawned(driver.gone(model="home")) == []

    def test_who_was_unloaded_meanwhile_does_not_come_back(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        driver.load("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.unload("home")
        driver.unload("guest")
        assert spawned(driver.gone(model="guest")) == []

    def test_a_pinned_one_that_was_asked_to_go_and_dies_of_it_stays_away(self) -> None:
        driver = Short(1, a=model(1, pinned=True))
        driver.loaded("a")
        driver.unload("a", force=True)
        assert spawned(driver.gone(RunnerDied("SIGSEGV"), "a")) == []
        assert driver.state("a") == "failed"
        assert driver.after(60) == []

    def test_a_pinned_one_beyond_help_stays_away(self) -> None:
        driver = Short(1, a=model(1, pinned=True))
        driver.load("a")
        driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
        assert driver.after(1000) == []

    def test_a_new_model_is_like_any_other(self) -> None:
        driver = Short(2, a=model(1))
        limits = Limits(backoff=Backoff(first=7, most=7), max_loaded=1)
        policies = {"new": model(1), "a": model(1), "newer": model(1)}
        devices = (Device(name="cpu", total=2 * GIB),)
        driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=limits, devices=devices))
        assert spawned(driver.acquire("new")[1]) == ["new"]
        found = driver.acquire("newer")[1]
        assert (spawned(found), rejected(found)) == ([], {})
        driver.gone(broken(), "new")
        driver.acquire("new")
        assert driver.view("new").retry_at == driver.now + 7

    def test_a_changed_model_ends_its_work_first(self) -> None:
        driver = Short(1, a=model(1))
        lease = driver.leased("a")
        devices = (Device(name="cpu", total=GIB),)
        restart = frozenset({"a"})
        policies = {"a": model(0.5)}
        driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=devices, restart=restart))
        assert driver.state("a") == "draining"
        assert stopped(driver.release(lease, "a")) == ["a"]

    def test_a_removed_model_ends_its_work_first(self) -> None:
        driver = Short(1, a=model(1))
        lease = driver.leased("a")
        driver.tell(ev.Reconfigure(policies={}, queue=9, limits=Limits()))
        assert driver.state("a") == "draining"
        assert stopped(driver.release(lease, "a")) == ["a"]


class TestView:
    def test_a_model_that_nobody_asked_for_yet(self) -> None:
        view = Short(1, a=model(1)).view("a")
        assert view == ModelView(
            state="stopped", generation=0, leases=0, waiting=0, last_used=None, expires=None, exits=0, error=None
        )

    def test_a_model_that_is_in_use(self) -> None:
        driver = Short(1, a=model(1))
        driver.leased("a")
        view = driver.view("a")
        assert (view.state, view.generation, view.leases, view.exits) == ("ready", 1, 1, 0)
        assert (view.reserved, view.reason, view.parting) == ({"cpu": GIB}, "loaded", "")
        assert (view.claimed, view.weighing, view.wanted, view.retry_at) == (False, False, False, None)

    def test_a_model_that_shall_come_back(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        driver.acquire("guest")
        driver.gone(model="home")
        view = driver.view("home")
        assert (view.state, view.claimed, view.wanted, view.retry_at) == ("stopped", False, True, None)


class TestQueue:
    def test_a_place_in_the_queue_is_free_again_when_its_waiter_is_served(self) -> None:
        driver = queued(2, busy=model(1))
        first, _ = driver.acquire("busy")
        driver.ready("busy")
        second, _ = driver.acquire("busy")
        driver.acquire("busy")
        assert rejected(driver.acquire("busy")[1])
        assert granted(driver.release(first, "busy")) == [second]
        assert not rejected(driver.acquire("busy")[1])
        assert rejected(driver.acquire("busy")[1])

    @pytest.mark.parametrize("kind", ["acquire", "load"])
    def test_and_when_it_leaves(self, kind: str) -> None:
        driver = queued(2, slow=model(1))
        waiting, _ = driver.acquire("slow") if kind == "acquire" else driver.load("slow")
        driver.acquire("slow")
        driver.cancel(waiting, "slow")
        driver.cancel(waiting, "slow")
        assert not rejected(driver.acquire("slow")[1])
        assert rejected(driver.acquire("slow")[1])

    def test_and_when_it_is_turned_away(self) -> None:
        driver = queued(3, a=model(1), b=model(1))
        driver.acquire("b")
        driver.acquire("a")
        driver.load("a")
        assert rejected(driver.acquire("b")[1])
        driver.gone(broken(), "a")
        assert not rejected(driver.acquire("b")[1])
        assert not rejected(driver.acquire("b")[1])
        assert rejected(driver.acquire("b")[1])

    def test_and_when_its_load_is_done(self) -> None:
        driver = queued(2, a=model(1), b=model(1))
        driver.load("a")
        driver.load("a")
        assert rejected(driver.load("b")[1])
        driver.ready("a")
        assert not rejected(driver.load("b")[1])
        assert not rejected(driver.load("b")[1])
        assert rejected(driver.load("b")[1])

    def test_the_queue_of_a_model_has_both_who_asks_and_who_loads(self) -> None:
        driver = Short(9, a=model(1, queue=2))
        driver.acquire("a")
        driver.load("a")
        ticket, found = driver.load("a")
        assert rejected(found) == {ticket: "queue_full"}

    def test_who_waits_for_a_place_and_who_waits_for_a_load_are_seen_alike(self) -> None:
        driver = Short(9, a=model(1))
        driver.acquire("a")
        driver.load("a")
        driver.load("a")
        assert driver.view("a").waiting == 3


class TestKeepAlive:
    def test_the_wish_of_who_loads_it(self) -> None:
        driver = Short(1, a=model(1, keep_alive=600.0))
        driver.tell(ev.Load(1, "a", 5.0))
        driver.tell(ev.Load(2, "a"))
        driver.ready("a")
        assert driver.view("a").expires == driver.now + 5
        driver.tell(ev.Load(3, "a"))
        assert driver.view("a").expires == driver.now + 5
        driver.tell(ev.Load(4, "a", 1.0))
        assert driver.view("a").expires == driver.now + 1

    def test_who_has_no_wish_changes_nothing_though_others_have_one(self) -> None:
        driver = Short(1, a=model(1, keep_alive=600.0))
        driver.tell(ev.Acquire(1, "a", 5.0))
        driver.ready("a")
        driver.tell(ev.Acquire(2, "a"), ev.Acquire(3, "a", 60.0))
        driver.release(1, "a")
        driver.tell(ev.Cancel(3, "a"))
        driver.release(2, "a")
        assert driver.view("a").expires == driver.now + 5

    def test_who_left_or_was_refused_leaves_no_wish_behind(self) -> None:
        driver = Short(1, a=model(1, queue=1))
        driver.leased("a")
        driver.tell(ev.Acquire(7, "a", 5.0), ev.Acquire(8, "a", 5.0), ev.Cancel(7, "a"))
        assert driver.scheduler._books["a"].wished == {}

    def test_who_left_a_load_is_not_answered(self) -> None:
        driver = Short(1, a=model(1))
        ticket, _ = driver.load("a")
        driver.cancel(ticket, "a")
        assert done(driver.ready("a")) == []
        assert driver.view("a").waiting == 0

    def test_use_is_seen(self) -> None:
        driver = Short(1, a=model(1))
        assert driver.view("a").last_used is None
        driver.loaded("a")
        driver.after(3)
        driver.acquire("a")
        assert driver.view("a").last_used == driver.now
        assert driver.view("a").expires is None
