"""Who is loaded though nobody asks: those that had to go and shall come back, pinned ones that crashed, preloaded ones."""

from __future__ import annotations

import itertools

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device

from .driving import GIB, UNLIMITED, Short, broken, done, granted, model, only, rejected, spawned, stopped

BESIDE_OTHERS = (Device(name="cpu", total=2 * GIB, minimum=GIB // 4),)
"""A device of which less is free, at times, than is always to be kept."""


def guest_is_in(driver: Short) -> None:
    """Home was put out for a guest, which is loaded and idle now."""
    driver.loaded("home")
    ticket, found = driver.acquire("guest")
    assert stopped(found) == ["home"]
    driver.gone(model="home")
    driver.ready("guest")
    driver.release(ticket, "guest")


def guest_goes(driver: Short) -> list[fx.Effect]:
    driver.unload("guest")
    return driver.gone(model="guest")


def with_a_guest_that_leaves() -> Short:
    """Who was at home had to go for a guest, who goes now; what home needs is weighed each time."""
    driver = Short(1, home=model(memory=None, comes_back=True), guest=model(1))
    driver.load("home")
    driver.tell(ev.Weighed("home", 1, GIB))
    driver.ready("home")
    driver.acquire("guest")
    driver.gone(model="home")
    driver.ready("guest")
    driver.unload("guest", force=True)
    return driver


class TestRoomAgain:
    def test_one_that_outgrows_its_device_is_not_loaded_for_it_again_and_again(self) -> None:
        driver = Short(2, home=model(0.5, comes_back=True))
        driver.sampled(free=2)
        driver.loaded("home")
        assert stopped(driver.sampled(free=0, home=2.5)) == ["home"]
        found = driver.gone(model="home")
        for _ in range(20):
            found += driver.after(1) + driver.sampled(free=2)
        assert spawned(found) == []
        assert any("not loaded again: model requires 2.5 GiB" in each.reason for each in only(found, fx.Noticed))
        assert not driver.scheduler.expectant
        assert spawned(driver.acquire("home")[1]) == ["home"]

    def test_one_that_others_crowd_out_again_and_again_comes_back_more_and_more_seldom(self) -> None:
        driver = Short(devices=BESIDE_OTHERS, home=model(1, comes_back=True))
        driver.sampled(free=2)
        driver.loaded("home")
        loads, end = 0, driver.now + 3600
        while driver.now < end:
            if driver.state("home") == "ready":
                driver.sampled(free=0, home=1)
                driver.gone(model="home")
            driver.sampled(free=2)
            driver.after(1)
            if driver.state("home") == "starting":
                loads += 1
                driver.ready("home")
        assert 10 < loads < 25

    def test_what_is_crowded_out_but_seldom_comes_back_soon(self) -> None:
        driver = Short(devices=BESIDE_OTHERS, home=model(1, comes_back=True, keep_alive=-1.0))
        driver.sampled(free=2)
        driver.loaded("home")
        for _ in range(8):
            driver.after(300)
            driver.sampled(free=0, home=1)
            driver.gone(model="home")
            driver.sampled(free=2)
            assert spawned(driver.after(1)) == ["home"]
            driver.ready("home")

    def test_it_waits_for_as_much_as_it_held(self) -> None:
        driver = Short(4, home=model(1, comes_back=True), guest=model(4), small=model(2))
        driver.sampled(free=4)
        driver.loaded("home")
        driver.sampled(free=1, home=3)
        driver.acquire("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.unload("guest", force=True)
        driver.acquire("small")
        found = driver.gone(model="guest") + driver.sampled(free=4) + driver.after(10)
        assert spawned(found) == ["small"]
        driver.ready("small")
        driver.unload("small", force=True)
        assert spawned(driver.gone(model="small") + driver.sampled(free=4)) == ["home"]

    def test_one_that_cannot_be_loaded_any_more_is_weighed_once(self) -> None:
        driver = with_a_guest_that_leaves()
        assert only(driver.gone(model="guest"), fx.Weigh) == [fx.Weigh("home", 2)]
        gone = LoadFailed("no such file", details={"permanent": True})
        found = driver.tell(ev.Unfit("home", 2, gone)) + driver.after(1000) + driver.sampled(free=1)
        assert only(found, fx.Weigh) == []
        assert driver.state("home") == "failed"
        assert not driver.scheduler.expectant

    def test_one_that_cannot_be_loaded_just_now_is_tried_less_and_less_often(self) -> None:
        driver = with_a_guest_that_leaves()
        found, tries = driver.gone(model="guest"), []
        for _ in range(1200):
            for question in only(found, fx.Weigh):
                tries.append(driver.now)
                found = driver.tell(ev.Unfit("home", question.attempt, LoadFailed("the disk does not answer")))
                assert only(found, fx.Weigh) == []
            found = driver.after(1)
        waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
        assert waits[:4] == [1, 2, 4, 8]
        assert waits[-1] == 300
        assert driver.state("home") == "backoff"
        asked, found = driver.acquire("home")
        assert only(found, fx.Weigh)
        driver.cancel(asked, "home")
        assert driver.state("home") == "backoff", "nobody waits, and it is tried again all the same"
        (question,) = only(driver.after(300), fx.Weigh)
        assert spawned(driver.tell(ev.Weighed("home", question.attempt, GIB))) == ["home"]

    def test_others_have_taken_all_and_nothing_is_loaded_meanwhile(self) -> None:
        driver = Short(devices=BESIDE_OTHERS, home=model(1, comes_back=True))
        driver.sampled(free=2)
        driver.loaded("home")
        driver.sampled(free=0, home=1)
        driver.gone(model="home")
        driver.sampled(free=0)
        driver.after(20)
        assert not driver.scheduler.live
        assert driver.scheduler.expectant, "nobody would look"
        assert driver.view("home").wanted
        assert spawned(driver.sampled(free=2)) == ["home"]
        assert not driver.scheduler.expectant

    def test_who_asks_for_it_and_leaves_does_not_make_it_forgotten(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        lease = driver.leased("home")
        ticket, _ = driver.acquire("guest")
        driver.release(lease, "home")
        asked, _ = driver.acquire("home")
        driver.gone(model="home")
        driver.cancel(asked, "home")
        driver.ready("guest")
        driver.release(ticket, "guest")
        assert spawned(guest_goes(driver)) == ["home"]

    def test_who_asks_for_it_while_it_goes_has_the_guest_go(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        lease, _ = driver.acquire("guest")
        asked, _ = driver.acquire("home")
        driver.gone(model="home")
        driver.ready("guest")
        assert stopped(driver.release(lease, "guest")) == ["guest"]
        driver.gone(model="guest")
        assert granted(driver.ready("home")) == [asked]

    def test_whoever_has_it_unloaded_while_it_goes_means_it(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        driver.acquire("guest")
        driver.unload("home")
        driver.gone(model="home")
        driver.ready("guest")
        driver.unload("guest", force=True)
        assert spawned(driver.gone(model="guest")) == []

    def test_one_that_waits_after_a_crash_keeps_nobody_behind_it_waiting(self) -> None:
        homes = {name: model(1, comes_back=True, priority=rank) for name, rank in (("a", "high"), ("b", "low"))}
        driver = Short(2, UNLIMITED, (), guest=model(2), **homes)
        first = driver.leased("a")
        driver.loaded("b")
        driver.acquire("guest")
        driver.after(15)
        assert driver.state("a") == "draining"
        driver.gone(RunnerDied("SIGKILL"), "a")
        driver.release(first, "a")
        driver.gone(model="b")
        driver.ready("guest")
        driver.scheduler._books["a"].breaker.retry_at = driver.now + 30
        driver.unload("guest", force=True)
        assert spawned(driver.gone(model="guest")) == ["b"]
        assert spawned(driver.after(30)) == ["a"]


class TestPinned:
    def crashed_while_memory_is_short(self) -> Short:
        driver = Short(2, a=model(1, pinned=True))
        driver.sampled(free=2)
        driver.loaded("a")
        driver.sampled(free=1, a=1)
        driver.gone(RunnerDied("SIGKILL"), "a")
        for _ in range(60):
            driver.sampled(free=0.2)
            assert spawned(driver.after(1)) == []
        return driver

    def test_it_comes_up_when_there_is_memory_again(self) -> None:
        driver = self.crashed_while_memory_is_short()
        assert driver.state("a") == "backoff"
        assert driver.scheduler.expectant or driver.scheduler.hungry
        found = [driver.sampled(free=2) + driver.after(1) for _ in range(60)]
        assert [name for each in found for name in spawned(each)] == ["a"]

    def test_who_asks_meanwhile_is_told_and_the_next_one_is_served(self) -> None:
        driver = self.crashed_while_memory_is_short()
        ticket, found = driver.acquire("a")
        for _ in range(60):
            found += driver.after(1) + driver.sampled(free=0.2)
        assert rejected(found) == {ticket: "does_not_fit"}
        assert driver.state("a") == "backoff"
        ticket, found = driver.acquire("a")
        assert spawned(found + driver.sampled(free=2)) == ["a"]
        assert granted(driver.ready("a")) == [ticket]

    def test_whoever_has_it_unloaded_means_it(self) -> None:
        driver = self.crashed_while_memory_is_short()
        ticket, found = driver.unload("a")
        assert done(found) == [ticket]
        assert driver.state("a") == "stopped"
        assert spawned(driver.sampled(free=2) + driver.after(1000)) == []

    def test_its_files_cannot_be_read_for_a_while(self) -> None:
        driver = Short(2, a=model(memory=None, pinned=True))
        driver.load("a")
        driver.tell(ev.Weighed("a", 1, GIB))
        driver.ready("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        assert only(driver.after(0.5), fx.Weigh) == [fx.Weigh("a", 2)]
        driver.tell(ev.Unfit("a", 2, broken("the disk does not answer")))
        assert driver.state("a") == "backoff"
        assert only(driver.after(1), fx.Weigh) == [fx.Weigh("a", 3)]
        assert spawned(driver.tell(ev.Weighed("a", 3, GIB))) == ["a"]

    def test_its_files_are_gone_for_good(self) -> None:
        driver = Short(2, a=model(memory=None, pinned=True))
        driver.load("a")
        driver.tell(ev.Weighed("a", 1, GIB))
        driver.ready("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        driver.after(0.5)
        driver.tell(ev.Unfit("a", 2, LoadFailed("no such file", details={"permanent": True})))
        assert driver.state("a") == "failed"
        assert driver.after(1000) == []

    def test_it_does_not_stand_behind_those_that_wait(self) -> None:
        driver = Short(2, a=model(memory=None, pinned=True), big=model(2), busy=model(1))
        driver.load("a")
        driver.tell(ev.Weighed("a", 1, GIB))
        driver.ready("a")
        driver.leased("busy")
        driver.gone(RunnerDied("SIGKILL"), "a")
        driver.after(0.5)
        driver.tell(ev.Unfit("a", 2, broken("the disk does not answer")))
        driver.acquire("big")
        assert driver.view("big").claimed
        assert only(driver.after(1), fx.Weigh) == [fx.Weigh("a", 3)]
        assert spawned(driver.tell(ev.Weighed("a", 3, GIB))) == ["a"]


class TestKeptForNoTime:
    """A keep-alive of 0 means: gone when its use is over. Who has not been used is not over."""

    def test_a_preloaded_one_stays_until_its_first_use(self) -> None:
        driver = Short(2, a=model(1, preload=True, keep_alive=0.0))
        driver.tell(ev.Start())
        assert stopped(driver.ready("a") + driver.after(1000)) == []
        ticket, found = driver.acquire("a")
        assert granted(found) == [ticket]
        assert stopped(driver.release(ticket, "a")) == ["a"]

    def test_one_that_was_loaded_by_hand_stays_until_its_first_use(self) -> None:
        driver = Short(2, a=model(1, keep_alive=0.0))
        ticket, _ = driver.load("a")
        found = driver.ready("a")
        assert done(found) == [ticket]
        assert stopped(found + driver.after(1000)) == []
        assert driver.scheduler.idle == ["a"], "and may be put out for others like any other"
        driver.load("a")
        assert driver.state("a") == "ready"

    def test_whoever_asks_for_no_time_at_all_gets_it(self) -> None:
        driver = Short(2, a=model(1))
        driver.tell(ev.Load(1, "a", 0.0))
        found = driver.ready("a")
        assert done(found) == [1]
        assert stopped(found) == ["a"]

    def test_who_asks_and_leaves_does_not_leave_it_there(self) -> None:
        driver = Short(2, a=model(1, keep_alive=0.0))
        ticket, _ = driver.acquire("a")
        driver.cancel(ticket, "a")
        assert stopped(driver.ready("a")) == ["a"]

    def test_used_at_once_it_goes_after_it(self) -> None:
        driver = Short(2, a=model(1, keep_alive=0.0))
        ticket, _ = driver.acquire("a")
        driver.load("a")
        driver.ready("a")
        assert stopped(driver.release(ticket, "a")) == ["a"]


def test_a_crash_of_what_came_back_is_not_answered_by_another_load() -> None:
    driver = Short(1, home=model(1, comes_back=True), guest=model(1))
    guest_is_in(driver)
    assert spawned(guest_goes(driver)) == ["home"]
    driver.gone(broken(), "home")
    assert driver.after(1000) == []
