"""What models need, how they fail, what is wished of them, and how the configuration changes under way."""

from __future__ import annotations

import itertools

import pytest

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.backoff import Backoff, Breaker
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy

from .driving import GIB, Short, broken, changes, done, granted, model, only, rejected, spawned, stopped


class TestWeighing:
    def test_nothing_is_spawned_before_its_need_is_known(self) -> None:
        driver = Short(3, a=model(memory=None))
        ticket, found = driver.acquire("a")
        assert found == [fx.Weigh("a", 1)]
        assert spawned(driver.tell(ev.Weighed("a", 1, 2 * GIB))) == ["a"]
        assert granted(driver.ready("a")) == [ticket]

    def test_an_answer_to_an_earlier_question_is_ignored(self) -> None:
        driver = Short(3, a=model(memory=None))
        ticket, _ = driver.acquire("a")
        driver.cancel(ticket, "a")
        assert driver.acquire("a")[1] == [fx.Weigh("a", 2)]
        assert driver.tell(ev.Weighed("a", 1, GIB), ev.Unfit("a", 1, broken())) == []
        assert spawned(driver.tell(ev.Weighed("a", 2, GIB))) == ["a"]

    def test_what_cannot_be_is_told_and_looked_at_again_a_little_later(self) -> None:
        driver = Short(3, a=model(memory=None))
        ticket, _ = driver.acquire("a")
        error = LoadFailed("no such file", details={"permanent": True})
        assert rejected(driver.tell(ev.Unfit("a", 1, error))) == {ticket: "load_failed"}
        assert driver.state("a") == "failed"
        ticket, found = driver.acquire("a")
        assert rejected(found) == {ticket: "load_failed"}
        driver.after(1)
        assert driver.acquire("a")[1] == [fx.Weigh("a", 2)]


class TestFailures:
    def test_who_asks_waits_until_it_may_be_tried_again(self) -> None:
        driver = Short(3, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        ticket, found = driver.acquire("a")
        assert changes(found) == [("failed", "backoff")]
        assert driver.after(0.4) == []
        assert spawned(driver.after(0.1)) == ["a"]
        assert granted(driver.ready("a")) == [ticket]

    def test_who_leaves_meanwhile_wants_nothing_any_more(self) -> None:
        driver = Short(3, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        ticket, _ = driver.acquire("a")
        assert changes(driver.cancel(ticket, "a")) == [("backoff", "failed")]
        assert driver.after(60) == []

    def test_after_five_the_cached_cause_is_the_answer_and_one_probe_goes_through(self) -> None:
        driver = Short(3, a=model(1))
        for _ in range(5):
            driver.acquire("a")
            driver.after(9)
            driver.gone(broken(), "a")
        ticket, found = driver.acquire("a")
        assert rejected(found) == {ticket: "backoff"}
        error = only(found, fx.Reject)[0].error
        assert error.retry_after == pytest.approx(8)
        assert error.details["last_words"] == ["bye"]
        driver.after(8)
        probe, found = driver.acquire("a")
        assert spawned(found) == ["a"]
        other, found = driver.acquire("a")
        assert rejected(found) == {other: "backoff"}
        assert granted(driver.ready("a")) == [probe]
        assert rejected(driver.acquire("a")[1]) == {}

    def test_what_cannot_heal_is_not_tried_again_unless_somebody_says_so(self) -> None:
        driver = Short(3, a=model(1))
        driver.acquire("a")
        driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
        driver.after(1000)
        ticket, found = driver.acquire("a")
        assert rejected(found) == {ticket: "load_failed"}
        assert spawned(driver.load("a")[1]) == ["a"]

    def test_a_pinned_one_comes_up_again_by_itself(self) -> None:
        driver = Short(3, a=model(1, pinned=True))
        driver.loaded("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        assert driver.state("a") == "backoff"
        assert spawned(driver.after(0.5)) == ["a"]

    def test_waits_double_to_their_bound_and_health_makes_them_short_again(self) -> None:
        breaker, now, waits = Breaker(Backoff(failures=100)), 0.0, []
        for _ in range(8):
            breaker.failed(now, 0.0)
            waits.append(breaker.retry_at - now)
            now = breaker.retry_at
        assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
        breaker.ready(now)
        breaker.failed(now + 9.9, 0.0)
        assert breaker.retry_at - now - 9.9 == pytest.approx(30)
        breaker.ready(now)
        breaker.failed(now + 10, 1.0)
        assert breaker.retry_at - now - 10 == pytest.approx(0.375)


class TestWishes:
    def test_preloads_come_by_priority_and_put_nobody_out(self) -> None:
        driver = Short(2, a=model(1, preload=True, priority="low"), b=model(2, preload=True), c=model(1))
        found = driver.tell(ev.Start())
        assert spawned(found) == ["b"]
        assert [notice.model for notice in only(found, fx.Noticed)] == ["a"]

    def test_a_preload_that_is_asked_for_is_a_request_like_any_other(self) -> None:
        driver = Short(2, a=model(1, preload=True, memory=None))
        driver.tell(ev.Start())
        ticket, found = driver.acquire("a")
        assert found == [fx.Weigh("a", 2)]
        driver.tell(ev.Weighed("a", 2, GIB))
        assert granted(driver.ready("a")) == [ticket]

    def test_who_went_for_a_guest_comes_back_when_there_is_room(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1, keep_alive=60.0))
        driver.loaded("home")
        ticket, _ = driver.acquire("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.release(ticket, "guest")
        assert stopped(driver.after(60)) == ["guest"]
        assert spawned(driver.gone(model="guest")) == ["home"]

    def test_the_wish_of_a_granted_request_holds_until_it_is_unloaded(self) -> None:
        driver = Short(1, a=model(1, keep_alive=600.0))
        driver.tell(ev.Acquire(1, "a", 5.0))
        driver.ready("a")
        driver.release(1, "a")
        assert driver.view("a").expires == driver.now + 5
        driver.tell(ev.Acquire(2, "a"))
        driver.release(2, "a")
        assert driver.view("a").expires == driver.now + 5
        driver.after(5)
        driver.gone(model="a")
        driver.loaded("a")
        assert driver.view("a").expires == driver.now + 600

    def test_a_refused_request_has_no_wish(self) -> None:
        driver = Short(1, a=model(1, queue=1))
        lease = driver.leased("a")
        driver.acquire("a")
        number = 77
        assert rejected(driver.tell(ev.Acquire(number, "a", -1.0))) == {number: "queue_full"}
        driver.release(lease, "a")
        assert driver.view("a").leases == 1

    def test_a_pinned_one_is_unloaded_by_force_only(self) -> None:
        driver = Short(1, a=model(1, pinned=True))
        driver.loaded("a")
        ticket, found = driver.unload("a")
        assert rejected(found) == {ticket: "conflict"}
        ticket, found = driver.unload("a", force=True)
        assert stopped(found) == ["a"]
        assert done(driver.gone(model="a")) == [ticket]


class TestReconfiguring:
    def change(
        self, driver: Short, restart: tuple[str, ...] = (), gib: float = 3, **policies: Policy
    ) -> list[fx.Effect]:
        devices = (Device(name="cpu", total=int(gib * GIB)),)
        return driver.tell(
            ev.Reconfigure(policies=policies, queue=100, limits=Limits(), devices=devices, restart=frozenset(restart))
        )

    def test_what_is_gone_from_it_ends_its_work_and_is_forgotten(self) -> None:
        driver = Short(3, a=model(1), b=model(1))
        lease = driver.leased("a")
        waiting, _ = driver.acquire("a")
        found = self.change(driver, b=model(1))
        assert rejected(found) == {waiting: "model_not_found"}
        assert driver.state("a") == "draining"
        driver.release(lease, "a")
        assert only(driver.gone(model="a"), fx.Forget) == [fx.Forget("a")]
        assert driver.scheduler.models == ["b"]
        assert rejected(driver.acquire("a")[1])

    def test_what_changed_is_loaded_anew_for_who_waits(self) -> None:
        driver = Short(3, a=model(1), b=model(1))
        lease = driver.leased("a")
        driver.loaded("b")
        waiting, _ = driver.acquire("a")
        found = self.change(driver, ("a",), a=model(2), b=model(1))
        assert rejected(found) == {}
        assert driver.state("b") == "ready"
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["a"]
        assert driver.view("a").reserved == {"cpu": 2 * GIB}
        assert granted(driver.ready("a")) == [waiting]

    def test_more_places_are_given_out_at_once(self) -> None:
        driver = Short(3, a=model(1))
        driver.leased("a")
        waiting, _ = driver.acquire("a")
        assert granted(self.change(driver, a=model(1, concurrency=2))) == [waiting]

    def test_a_larger_device_lets_in_who_waits(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.leased("a")
        driver.acquire("b")
        assert spawned(self.change(driver, gib=2, a=model(1), b=model(1))) == ["b"]


class TestInterleavings:
    def test_two_models_that_want_one_place_are_both_served_in_any_order(self) -> None:
        """The classic deadlock: the victim is asked for again while it goes. Every order of what may happen next."""
        for order in itertools.permutations(["ask", "ask again", "leave", "tick", "release"]):
            driver = Short(1, a=model(1), b=model(1))
            lease = driver.leased("a")
            waiting: dict[int, str] = {}
            for step in order:
                found: list[fx.Effect] = []
                if step == "ask":
                    ticket, found = driver.acquire("b")
                    waiting[ticket] = "b"
                elif step == "ask again":
                    ticket, found = driver.acquire("a")
                    waiting[ticket] = "a"
                elif step == "leave":
                    ticket, found = driver.acquire("b")
                    found += driver.cancel(ticket, "b")
                elif step == "tick":
                    found = driver.after(20)
                else:
                    found = driver.release(lease, "a")
                self.settle(driver, waiting, found)
            for _ in range(20):
                self.settle(driver, waiting, driver.after(1))
            assert waiting == {}, order

    @staticmethod
    def settle(driver: Short, waiting: dict[int, str], found: list[fx.Effect]) -> None:
        """Let processes obey and work be done, until nothing more happens."""
        while found:
            effect = found.pop(0)
            if isinstance(effect, fx.Grant) and effect.ticket in waiting:
                found += driver.release(effect.ticket, waiting.pop(effect.ticket))
            elif isinstance(effect, fx.Stop):
                found += driver.gone(model=effect.model)
            elif isinstance(effect, fx.Spawn):
                found += driver.ready(effect.model)
