"""Another configuration under way: what waits keeps its place, what is idle its clock, and what was put out by hand stays out."""

from __future__ import annotations

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy

from .driving import GIB, UNLIMITED, Short, granted, model, only, spawned, stopped


class Reread(Short):
    """A driver that remembers its configuration."""

    def __init__(self, gib: float = 3, **policies: Policy) -> None:
        super().__init__(gib, UNLIMITED, (), **policies)
        self.gib = gib
        self.policies = policies

    def reload(self, *changed: str, gib: float | None = None, **policies: Policy) -> list[fx.Effect]:
        """Take over these entries, the others as they were; `changed` are those that run with the old one no longer."""
        self.gib = self.gib if gib is None else gib
        self.policies = {**self.policies, **policies}
        devices = (Device(name="cpu", total=int(self.gib * GIB)),)
        return self.tell(
            ev.Reconfigure(
                policies=self.policies, queue=100, limits=Limits(), devices=devices, restart=frozenset(changed)
            )
        )


class TestClaims:
    def test_a_pinned_one_that_waits_for_memory_goes_on_waiting(self) -> None:
        driver = Reread(2, a=model(1, pinned=True), b=model(2))
        driver.loaded("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        lease = driver.leased("b")
        driver.after(1)
        driver.reload()
        assert driver.view("a").claimed
        assert stopped(driver.release(lease, "b")) == ["b"]
        assert spawned(driver.gone(model="b")) == ["a"]

    def test_what_was_put_out_for_a_model_is_still_its_own(self) -> None:
        driver = Reread(2, a=model(2), b=model(2, priority="low"), s=model(1))
        driver.loaded("a")
        assert stopped(driver.acquire("b")[1]) == ["a"]
        driver.reload()
        driver.acquire("s")
        assert spawned(driver.gone(model="a")) == ["b"]

    def test_patience_is_not_begun_anew(self) -> None:
        driver = Reread(1, a=model(1, concurrency=5), b=model(1))
        driver.leased("a")
        driver.acquire("b")
        driver.after(14)
        driver.reload()
        driver.after(1)
        assert driver.state("a") == "draining"

    def test_nobody_is_weighed_twice_for_it(self) -> None:
        driver = Reread(2, a=model(memory=None), busy=model(2))
        driver.leased("busy")
        ticket, _ = driver.acquire("a")
        assert only(driver.reload(), fx.Weigh) == []
        driver.tell(ev.Weighed("a", 1, GIB))
        assert only(driver.reload(), fx.Weigh) == []
        driver.unload("busy", force=True)
        assert spawned(driver.gone(model="busy")) == ["a"]
        assert granted(driver.ready("a")) == [ticket]

    def test_what_it_needs_by_the_new_one_is_found_out(self) -> None:
        driver = Reread(2, a=model(memory=None), busy=model(1))
        driver.leased("busy")
        driver.acquire("a")
        driver.tell(ev.Weighed("a", 1, 2 * GIB))
        assert only(driver.reload("a"), fx.Weigh) == [fx.Weigh("a", 2)]
        assert driver.tell(ev.Weighed("a", 1, 3 * GIB)) == []
        assert spawned(driver.tell(ev.Weighed("a", 2, GIB))) == ["a"]

    def test_what_is_said_by_the_new_one_counts_and_no_answer_to_an_earlier_question(self) -> None:
        for late in (ev.Weighed("a", 1, 7 * GIB), ev.Unfit("a", 1, LoadFailed("no such file"))):
            driver = Reread(2, a=model(memory=None), busy=model(2))
            driver.leased("busy")
            driver.acquire("a")
            driver.reload("a", a=model(1))
            assert driver.tell(late) == []
            driver.unload("busy", force=True)
            assert spawned(driver.gone(model="busy")) == ["a"]

    def test_another_priority_gives_another_place(self) -> None:
        driver = Reread(1, a=model(1), b=model(1), busy=model(1))
        driver.leased("busy")
        driver.acquire("a")
        driver.acquire("b")
        driver.reload("b", b=model(1, priority="high"))
        driver.unload("busy", force=True)
        assert spawned(driver.gone(model="busy")) == ["b"]

    def test_a_smaller_device_refuses_who_waits(self) -> None:
        driver = Reread(2, a=model(2), busy=model(1))
        driver.leased("busy")
        ticket, _ = driver.acquire("a")
        found = driver.reload(gib=1.5)
        assert [effect.ticket for effect in only(found, fx.Reject)] == [ticket]

    def test_also_who_stands_behind_another(self) -> None:
        driver = Reread(2, a=model(1.5), b=model(2), busy=model(1))
        driver.leased("busy")
        driver.acquire("a")
        ticket, _ = driver.acquire("b")
        found = driver.reload(gib=1.75)
        assert [effect.ticket for effect in only(found, fx.Reject)] == [ticket]

    def test_who_waits_after_a_failure_need_not_wait_for_what_was_mended(self) -> None:
        driver = Reread(1, a=model(1))
        driver.acquire("a")
        driver.gone(LoadFailed("bad option"), "a")
        ticket, _ = driver.acquire("a")
        assert driver.state("a") == "backoff"
        assert spawned(driver.reload("a")) == ["a"]
        assert granted(driver.ready("a")) == [ticket]
        assert spawned(driver.after(60)) == []

    def test_not_pinned_any_more_nobody_waits_for_it(self) -> None:
        driver = Reread(2, a=model(1, pinned=True), b=model(2))
        driver.loaded("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        driver.leased("b")
        driver.after(1)
        driver.reload("a", a=model(1))
        assert not driver.view("a").claimed
        assert driver.state("a") == "failed"
        driver.after(100)
        assert driver.state("b") == "ready"


class TestIdle:
    def test_a_clock_that_runs_goes_on_running(self) -> None:
        driver = Reread(3, a=model(1, keep_alive=60.0))
        driver.loaded("a")
        driver.after(50)
        driver.reload()
        driver.reload(a=model(1, keep_alive=60.0, concurrency=3))
        assert stopped(driver.after(10)) == ["a"]

    def test_another_time_counts_from_the_same_moment(self) -> None:
        driver = Reread(3, a=model(1, keep_alive=600.0), b=model(1, keep_alive=600.0))
        driver.loaded("a")
        driver.loaded("b")
        driver.after(50)
        driver.reload(a=model(1, keep_alive=60.0), b=model(1, keep_alive=20.0))
        assert stopped(driver.after(0)) == ["b"]
        assert stopped(driver.after(10)) == ["a"]

    def test_a_load_by_hand_counts_as_a_beginning(self) -> None:
        driver = Reread(3, a=model(1, keep_alive=60.0))
        driver.loaded("a")
        driver.after(50)
        driver.load("a")
        driver.reload(a=model(1, keep_alive=50.0))
        assert driver.view("a").expires == driver.now + 50

    def test_of_equals_the_one_that_is_idle_longest_still_goes_first(self) -> None:
        driver = Reread(2, b=model(1), a=model(1), c=model(1))
        driver.loaded("a")
        driver.loaded("b")
        driver.reload()
        assert driver.scheduler.idle == ["a", "b"]


class TestLoadedByItself:
    def test_what_was_put_out_by_hand_stays_out(self) -> None:
        driver = Reread(3, a=model(1, preload=True), b=model(1, preload=True))
        driver.tell(ev.Start())
        driver.ready("a")
        driver.ready("b")
        driver.unload("a")
        driver.gone(model="a")
        found = driver.reload("b", b=model(1.5, preload=True))
        assert stopped(found) == ["b"]
        found += driver.gone(model="b") + driver.reload("a") + driver.after(100)
        assert spawned(found) == ["b"]

    def test_asked_for_again_it_is_as_any_other(self) -> None:
        driver = Reread(3, a=model(1, preload=True))
        driver.loaded("a")
        driver.unload("a")
        driver.gone(model="a")
        driver.loaded("a")
        driver.gone(RunnerDied("SIGKILL"), "a")
        assert spawned(driver.reload("a")) == ["a"]

    def test_a_preloaded_one_that_changed_puts_nobody_out(self) -> None:
        driver = Reread(2, a=model(1, preload=True), b=model(1))
        driver.tell(ev.Start())
        driver.ready("a")
        driver.loaded("b")
        driver.reload("a", a=model(2, preload=True))
        found = driver.gone(model="a")
        assert (spawned(found), stopped(found)) == ([], [])
        assert driver.state("b") == "ready"

    def test_a_new_one_is_loaded_and_one_that_was_there_is_not(self) -> None:
        driver = Reread(3, a=model(1, preload=True))
        assert spawned(driver.reload(b=model(1, preload=True), c=model(1))) == ["b"]

    def test_a_pinned_one_that_changed_is_loaded_anew(self) -> None:
        driver = Reread(2, a=model(2, pinned=True), b=model(1))
        driver.loaded("a")
        driver.reload("a", gib=1.5, a=model(1, pinned=True))
        assert spawned(driver.gone(model="a")) == ["a"]

    def test_a_pinned_one_that_changed_waits_for_room_if_it_must(self) -> None:
        driver = Reread(2, a=model(1, pinned=True), b=model(1))
        driver.loaded("a")
        lease = driver.leased("b")
        driver.reload("a", a=model(2, pinned=True))
        assert spawned(driver.gone(model="a")) == []
        assert stopped(driver.release(lease, "b")) == ["b"]
        assert spawned(driver.gone(model="b")) == ["a"]

    def test_a_pinned_one_that_could_not_be_loaded_is_tried_again(self) -> None:
        driver = Reread(2, a=model(1, pinned=True))
        driver.loaded("a")
        driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
        assert driver.after(1000) == []
        assert spawned(driver.reload("a")) == ["a"]

    def test_but_not_one_that_was_put_out_by_hand(self) -> None:
        driver = Reread(2, a=model(1, pinned=True))
        driver.loaded("a")
        driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
        driver.unload("a")
        assert spawned(driver.reload("a") + driver.after(1000)) == []

    def test_taken_out_and_put_in_again_while_it_works(self) -> None:
        driver = Reread(2, a=model(1, pinned=True), b=model(1, preload=True), c=model(1))
        lease = driver.leased("a")
        policies = driver.policies
        driver.policies = {"c": policies["c"]}
        driver.reload()
        driver.policies = policies
        driver.reload()
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["a"]

    def test_who_shall_not_come_back_any_more_does_not(self) -> None:
        driver = Reread(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        driver.acquire("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.reload("home", home=model(1))
        assert not driver.scheduler.expectant
        driver.unload("guest", force=True)
        assert spawned(driver.gone(model="guest") + driver.after(100)) == []

    def test_who_shall_come_back_does_so_whatever_else_has_changed(self) -> None:
        driver = Reread(2, home=model(2, comes_back=True), guest=model(2))
        driver.loaded("home")
        driver.acquire("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.reload("home", gib=1.5, home=model(1, comes_back=True, priority="low"))
        driver.unload("guest", force=True)
        assert spawned(driver.gone(model="guest")) == ["home"]
        assert driver.view("home").reserved == {"cpu": GIB}

    def test_a_preload_that_waits_after_a_failure_and_is_none_any_more(self) -> None:
        driver = Reread(2, a=model(1, preload=True))
        driver.load("a")
        driver.gone(LoadFailed("bad option"), "a")
        driver.tell(ev.Start())
        assert driver.state("a") == "backoff"
        driver.reload("a", a=model(1))
        assert driver.state("a") == "failed"
        assert driver.after(1000) == []

    def test_a_preload_that_is_none_any_more_is_not_waited_for(self) -> None:
        driver = Reread(2, a=model(memory=None, preload=True))
        driver.tell(ev.Start())
        assert driver.reload("a", a=model(memory=None)) == []
        assert driver.tell(ev.Weighed("a", 1, GIB)) == []
        assert driver.state("a") == "stopped"


class TestMakingRoom:
    """A model that takes no new work, as another one needs its memory, and is changed meanwhile."""

    def making_room(self, **keys: object) -> tuple[Reread, int, int]:
        driver = Reread(4, a=model(3, **keys), b=model(3))
        lease = driver.leased("a")
        rival, _ = driver.acquire("b")
        driver.after(16)
        assert driver.state("a") == "draining"
        driver.reload("a", a=model(3, concurrency=2, **keys))
        return driver, lease, rival

    def test_it_goes_though_the_others_leave(self) -> None:
        driver, lease, rival = self.making_room()
        driver.cancel(rival, "b")
        assert driver.state("a") == "draining"
        assert stopped(driver.release(lease, "a")) == ["a"]
        assert spawned(driver.gone(model="a")) == []

    def test_who_asks_for_it_gets_the_new_one(self) -> None:
        driver, lease, rival = self.making_room()
        ticket, _ = driver.acquire("a")
        driver.cancel(rival, "b")
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["a"]
        assert granted(driver.ready("a")) == [ticket]

    def test_it_goes_after_its_drain_timeout(self) -> None:
        driver, _, rival = self.making_room()
        driver.cancel(rival, "b")
        assert stopped(driver.after(30)) == ["a"]

    def test_what_is_preloaded_is_loaded_again(self) -> None:
        driver, lease, rival = self.making_room(preload=True)
        driver.cancel(rival, "b")
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["a"]

    def test_what_comes_back_comes_back_when_there_is_room(self) -> None:
        driver, lease, rival = self.making_room(comes_back=True)
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["b"]
        driver.ready("b")
        driver.release(rival, "b")
        driver.unload("b")
        assert spawned(driver.gone(model="b")) == ["a"]

    def test_what_was_put_out_by_hand_stays_out(self) -> None:
        driver, lease, rival = self.making_room(preload=True)
        driver.unload("a")
        driver.cancel(rival, "b")
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == []


class TestPreloads:
    """A reload brings models that shall be there, and ends others: those wait until these are gone."""

    def test_one_in_the_place_of_another(self) -> None:
        driver = Reread(4, a=model(3))
        driver.loaded("a")
        driver.policies = {}
        driver.reload(b=model(3, preload=True))
        assert driver.view("b").claimed
        assert driver.view("b").wanted
        assert spawned(driver.gone(model="a")) == ["b"]

    def test_one_that_waits_for_work_to_end(self) -> None:
        driver = Reread(4, a=model(3))
        lease = driver.leased("a")
        driver.policies = {}
        driver.reload(b=model(3, preload=True))
        driver.after(10)
        driver.release(lease, "a")
        assert spawned(driver.gone(model="a")) == ["b"]

    def test_two_that_change_their_sizes(self) -> None:
        driver = Reread(8, a=model(4, preload=True), b=model(4, preload=True))
        driver.loaded("a")
        driver.loaded("b")
        driver.reload("a", "b", a=model(5, preload=True), b=model(3, preload=True))
        found = driver.gone(model="a") + driver.gone(model="b")
        assert sorted(spawned(found)) == ["a", "b"]

    def test_one_whose_memory_is_shown_later(self) -> None:
        driver = Reread(8, a=model(5, preload=True))
        driver.sampled(8)
        driver.loaded("a")
        driver.sampled(3, a=5)
        driver.reload("a", a=model(5.5, preload=True))
        assert spawned(driver.gone(model="a")) == []
        assert spawned(driver.sampled(8)) == ["a"]

    def test_one_for_which_those_who_go_are_not_enough_is_not_waited_with(self) -> None:
        driver = Reread(4, a=model(1), busy=model(2))
        driver.leased("busy")
        driver.loaded("a")
        del driver.policies["a"]
        found = driver.reload(b=model(3, preload=True))
        assert any(told.reason.startswith("not loaded: b needs 3.0 GiB") for told in only(found, fx.Noticed))
        assert not driver.view("b").claimed

    def test_it_gives_way_to_who_is_waited_for(self) -> None:
        driver = Reread(4, a=model(3), c=model(3))
        driver.loaded("a")
        del driver.policies["a"]
        driver.reload(b=model(3, preload=True))
        driver.after(5)
        found = driver.acquire("c")[1]
        assert any(told.reason.startswith("not loaded: b needs") for told in only(found, fx.Noticed))
        assert spawned(driver.gone(model="a")) == ["c"]
        assert not driver.view("b").claimed

    def test_it_is_waited_no_more_where_nobody_goes_after_all(self) -> None:
        """Who was to make room goes on with its work, as those who needed it have left."""
        driver = Reread(4, a=model(3), b=model(2))
        driver.leased("a")
        rival, _ = driver.acquire("b")
        driver.after(16)
        driver.reload(c=model(2, preload=True))
        assert driver.view("c").claimed
        driver.cancel(rival, "b")
        assert driver.state("a") == "ready"
        assert not driver.view("c").claimed

    def test_nor_where_who_goes_does_not_die(self) -> None:
        driver = Reread(3, a=model(3))
        driver.loaded("a")
        driver.policies = {}
        driver.reload(b=model(3, preload=True))
        driver.stuck("a")
        assert not driver.view("b").claimed

    def test_nor_while_another_is_in_vain_waited_for(self) -> None:
        driver = Reread(3, a=model(3), x=model(2))
        driver.leased("a")
        del driver.policies["a"]
        driver.reload(c=model(3, preload=True))
        driver.acquire("x")
        assert driver.view("c").claimed
        driver.stuck("a")
        assert driver.view("x").claimed
        assert not driver.view("c").claimed

    def test_who_shall_be_there_does_not_keep_others_from_what_is_free(self) -> None:
        driver = Reread(4, a=model(3), s=model(1))
        driver.loaded("a")
        del driver.policies["a"]
        driver.reload(b=model(3, preload=True))
        assert spawned(driver.acquire("s")[1]) == ["s"]

    def test_it_is_not_before_who_waits_for_more_than_comes_free(self) -> None:
        driver = Reread(10, x=model(4), y=model(4), big=model(8))
        leaving, staying = driver.leased("x"), driver.leased("y")
        driver.unload("x")
        driver.reload(b=model(4, preload=True))
        driver.acquire("big")
        driver.release(leaving, "x")
        assert spawned(driver.gone(model="x")) == []
        driver.release(staying, "y")
        assert spawned(driver.gone(model="y")) == ["big"]

    def test_it_is_wished_for_still_when_who_asked_for_it_has_left(self) -> None:
        driver = Reread(10, x=model(8))
        lease = driver.leased("x")
        driver.unload("x")
        driver.reload(b=model(6, preload=True))
        ticket, _ = driver.acquire("b")
        driver.cancel(ticket, "b")
        driver.release(lease, "x")
        assert spawned(driver.gone(model="x")) == ["b"]

    def test_nobody_wishes_for_one_that_is_unloaded(self) -> None:
        driver = Reread(10, x=model(8))
        driver.leased("x")
        driver.unload("x")
        driver.reload(b=model(6, preload=True))
        ticket, _ = driver.acquire("b")
        driver.unload("b")
        driver.cancel(ticket, "b")
        assert not driver.view("b").claimed

    def test_it_does_not_keep_away_who_returns_beside_it(self) -> None:
        driver = Reread(10, x=model(8, drain_timeout=600), r=model(1, comes_back=True))
        driver.loaded("r")
        driver.leased("x")
        driver.unload("x")
        driver.sampled(-1, x=8)
        driver.gone(model="r")
        driver.reload(b=model(6, preload=True))
        driver.sampled(2, x=8)
        assert driver.view("b").claimed
        assert spawned(driver.after(60)) == ["r"]
