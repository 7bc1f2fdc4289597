"""What the scheduler decides, behaviour by behaviour."""

from __future__ import annotations

import pytest

from mlxsup.errors import RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev

from .driving import Driver, answered, broken, changes, done, granted, only, policy, rejected, spawned, stopped


class TestLoading:
    def test_nothing_runs_before_it_is_asked_for(self) -> None:
        driver = Driver()
        assert driver.state() == "stopped"
        assert driver.view().generation == 0
        assert driver.scheduler.wake_at() is None

    def test_the_first_request_spawns_and_is_granted_when_ready(self) -> None:
        driver = Driver()
        ticket, found = driver.acquire()
        assert found == [fx.Changed("m", "stopped", "starting", 1, "asked for"), fx.Spawn("m", 1)]
        assert granted(driver.ready()) == [ticket]
        assert driver.view().leases == 1

    def test_many_waiters_are_one_spawn(self) -> None:
        driver = Driver(m=policy(concurrency=3))
        tickets = []
        spawns = []
        for _ in range(5):
            ticket, found = driver.acquire()
            tickets.append(ticket)
            spawns += spawned(found)
        assert spawns == ["m"]
        assert granted(driver.ready()) == tickets[:3]
        assert driver.view().waiting == 2

    def test_a_load_is_done_when_it_is_ready(self) -> None:
        driver = Driver()
        ticket, found = driver.load()
        assert spawned(found) == ["m"]
        assert done(driver.ready()) == [ticket]

    def test_a_load_of_a_ready_model_is_done_at_once_and_keeps_it_alive(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        driver.loaded()
        driver.after(59)
        ticket, found = driver.load()
        assert done(found) == [ticket]
        assert not stopped(driver.after(59))
        assert stopped(driver.after(1)) == ["m"]

    @pytest.mark.parametrize("told_first", [True, False], ids=["failing, then gone", "gone at once"])
    def test_a_failed_load_fails_all_who_waited_and_is_not_tried_again(self, told_first: bool) -> None:
        """The runner tells of a failure first when cleaning up takes its time, else only when all is gone."""
        driver = Driver()
        first, _ = driver.acquire()
        second, _ = driver.load()
        found = driver.failing(broken()) if told_first else []
        found += driver.gone(broken())
        assert rejected(found) == {first: "load_failed", second: "load_failed"}
        assert spawned(found) == []
        assert driver.state() == "failed"
        assert str(driver.view().error) == "no such file"

    def test_each_waiter_gets_an_error_of_its_own_with_all_its_facts(self) -> None:
        driver = Driver()
        driver.acquire()
        driver.acquire()
        found = driver.failing(broken()) + driver.gone(broken())
        one, other = (effect.error for effect in only(found, fx.Reject))
        assert one is not other
        assert one.details == other.details == {"last_words": ["bye"]}

    def test_a_failed_model_is_loaded_again_when_asked_for(self) -> None:
        driver = Driver()
        driver.acquire()
        driver.gone(broken())
        _, found = driver.acquire()
        assert only(found, fx.Spawn) == [fx.Spawn("m", 2)]
        driver.ready()
        assert driver.view().error is None

    def test_a_caller_who_leaves_does_not_end_the_load(self) -> None:
        driver = Driver()
        ticket, _ = driver.acquire()
        assert driver.cancel(ticket) == []
        assert answered(driver.ready()) == []
        assert driver.state() == "ready"
        assert driver.view().expires == driver.now + 60

    def test_one_of_a_hundred_stays(self) -> None:
        driver = Driver(m=policy(queue=100))
        tickets = [driver.acquire()[0] for _ in range(100)]
        for ticket in tickets[:-1]:
            driver.cancel(ticket)
        assert granted(driver.ready()) == tickets[-1:]

    def test_loads_of_two_models_go_side_by_side(self) -> None:
        driver = Driver(a=policy(), b=policy())
        assert spawned(driver.acquire("a")[1]) == ["a"]
        assert spawned(driver.acquire("b")[1]) == ["b"]


class TestSharing:
    def test_a_ready_model_is_granted_at_once(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, found = driver.acquire()
        assert found == [fx.Grant(ticket, "m", 1)]

    def test_a_busy_model_is_waited_for_in_order(self) -> None:
        driver = Driver()
        first = driver.leased()
        second, _ = driver.acquire()
        third, _ = driver.acquire()
        assert granted(driver.release(first)) == [second]
        assert granted(driver.release(second)) == [third]

    def test_a_slow_load_keeps_nobody_else_waiting(self) -> None:
        driver = Driver(slow=policy(), fast=policy())
        driver.acquire("slow")
        driver.loaded("fast")
        ticket, found = driver.acquire("fast")
        assert granted(found) == [ticket]

    def test_a_waiter_who_leaves_loses_the_place_to_the_next(self) -> None:
        driver = Driver()
        first = driver.leased()
        second, _ = driver.acquire()
        third, _ = driver.acquire()
        driver.cancel(second)
        assert granted(driver.release(first)) == [third]

    def test_a_granted_caller_who_leaves_gives_the_lease_back(self) -> None:
        """The grant and the leaving cross: the caller never saw its lease."""
        driver = Driver()
        first = driver.leased()
        second, _ = driver.acquire()
        assert granted(driver.cancel(first)) == [second]

    def test_a_lease_ends_once(self) -> None:
        driver = Driver()
        first = driver.leased()
        second, _ = driver.acquire()
        third, _ = driver.acquire()
        assert granted(driver.release(first)) == [second]
        assert driver.release(first) == []
        assert driver.cancel(first) == []
        assert driver.view().leases == 1
        assert granted(driver.release(second)) == [third]

    @pytest.mark.parametrize("way", ["release", "cancel"])
    def test_the_lease_of_a_former_process_ends_nothing_of_the_next(self, way: str) -> None:
        driver = Driver()
        old = driver.leased()
        driver.gone(RunnerDied("killed"))
        new = driver.leased()
        assert (driver.release if way == "release" else driver.cancel)(old) == []
        assert driver.view().leases == 1
        assert granted(driver.release(new)) == []


class TestQueue:
    def test_beyond_the_queue_of_the_model(self) -> None:
        driver = Driver(m=policy(queue=2))
        driver.leased()
        driver.acquire()
        driver.acquire()
        ticket, found = driver.acquire()
        assert rejected(found) == {ticket: "queue_full"}
        assert only(found, fx.Reject)[0].error.retry_after

    def test_beyond_the_queue_of_all(self) -> None:
        driver = Driver(queue=2, a=policy(), b=policy(), c=policy())
        driver.acquire("a")
        driver.acquire("b")
        ticket, found = driver.acquire("c")
        assert rejected(found) == {ticket: "queue_full"}
        assert spawned(found) == []

    def test_the_message_has_the_number_of_those_who_wait_there(self) -> None:
        driver = Driver(queue=100, a=policy(queue=2), b=policy())
        for model in ("a", "a", "b", "b", "b"):
            driver.acquire(model)
        _, found = driver.acquire("a")
        assert only(found, fx.Reject)[0].error.message == "2 requests wait already, as many as may for a"

    def test_leased_ones_do_not_count(self) -> None:
        driver = Driver(queue=1, m=policy(concurrency=2, queue=1))
        driver.leased()
        ticket, found = driver.acquire()
        assert granted(found) == [ticket]
        _, found = driver.acquire()
        assert not rejected(found)

    def test_a_place_is_free_when_a_waiter_leaves(self) -> None:
        driver = Driver(queue=1)
        driver.leased()
        waiting, _ = driver.acquire()
        driver.cancel(waiting)
        assert not rejected(driver.acquire()[1])

    def test_a_ready_model_is_granted_though_the_queue_is_full(self) -> None:
        driver = Driver(queue=1, slow=policy(), fast=policy())
        driver.loaded("fast")
        driver.acquire("slow")
        ticket, found = driver.acquire("fast")
        assert granted(found) == [ticket]

    def test_loads_wait_in_it_too(self) -> None:
        driver = Driver(queue=3, one=policy(queue=2), other=policy())
        tickets = [driver.load("one")[0] for _ in range(2)]
        for ticket, found in (driver.load("one"), driver.acquire("one")):
            assert rejected(found) == {ticket: "queue_full"}
        (error,) = [effect.error for effect in only(found, fx.Reject)]
        assert str(error) == "2 requests wait already, as many as may for one"
        assert error.retry_after
        driver.load("other")
        ticket, found = driver.load("other")
        assert rejected(found) == {ticket: "queue_full"}
        assert "3 requests wait already, as many as may for all" in str(only(found, fx.Reject)[0].error)
        driver.cancel(tickets[0], "one")
        assert not rejected(driver.load("other")[1])
        driver.ready("one")
        assert not rejected(driver.load("other")[1]), "who has what it waited for does not wait"


class TestKeepAlive:
    def test_an_idle_model_goes_when_its_time_is_up(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        driver.loaded()
        assert driver.after(59.9) == []
        assert stopped(driver.after(0.1)) == ["m"]
        assert driver.state() == "stopping"
        driver.gone()
        assert driver.state() == "stopped"
        assert driver.scheduler.wake_at() is None

    def test_the_time_runs_from_the_last_release(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        ticket = driver.leased()
        assert driver.after(1000) == []
        driver.release(ticket)
        assert driver.view().expires == driver.now + 60
        assert driver.view().last_used == driver.now

    def test_a_request_in_time_stops_the_clock(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        driver.loaded()
        driver.after(59)
        driver.acquire()
        assert driver.after(1000) == []

    def test_the_clock_starts_with_the_last_of_several_leases(self) -> None:
        driver = Driver(m=policy(keep_alive=60, concurrency=2))
        first = driver.leased()
        second, _ = driver.acquire()
        driver.release(first)
        assert driver.view().expires is None
        driver.release(second)
        assert driver.view().expires == driver.now + 60

    def test_zero_means_at_once_after_the_last_one(self) -> None:
        driver = Driver(m=policy(keep_alive=0))
        first = driver.leased()
        second, _ = driver.acquire()
        found = driver.release(first)
        assert granted(found) == [second]
        assert stopped(found) == []
        assert stopped(driver.release(second)) == ["m"]

    def test_a_load_for_no_time_is_done_and_gone(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        driver.tell(ev.Load(1, "m", 0.0))
        found = driver.ready()
        assert done(found) == [1]
        assert stopped(found) == ["m"]

    def test_negative_means_never(self) -> None:
        driver = Driver(m=policy(keep_alive=-1))
        driver.release(driver.leased())
        assert driver.view().expires is None
        assert driver.after(1e9) == []
        assert driver.state() == "ready"

    def test_a_tick_before_its_time_changes_nothing(self) -> None:
        driver = Driver(m=policy(keep_alive=60))
        driver.loaded()
        assert driver.tell(ev.Tick(), ev.Tick()) == []

    def test_who_comes_while_it_goes_gets_the_next_one(self) -> None:
        driver = Driver(m=policy(keep_alive=0))
        driver.release(driver.leased())
        ticket, found = driver.acquire()
        assert found == []
        found = driver.gone()
        assert only(found, fx.Spawn) == [fx.Spawn("m", 2)]
        assert granted(driver.ready()) == [ticket]


class TestUnload:
    def test_what_is_not_loaded_is_done_at_once(self) -> None:
        driver = Driver()
        ticket, found = driver.unload()
        assert found == [fx.Done(ticket)]

    def test_an_idle_model_is_stopped_and_done_when_gone(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, found = driver.unload()
        assert stopped(found) == ["m"]
        assert done(found) == []
        assert done(driver.gone()) == [ticket]
        assert driver.state() == "stopped"

    def test_work_in_flight_ends_first(self) -> None:
        driver = Driver()
        lease = driver.leased()
        ticket, found = driver.unload()
        assert changes(found) == [("ready", "draining")]
        assert stopped(found) == []
        assert stopped(driver.release(lease)) == ["m"]
        assert done(driver.gone()) == [ticket]

    def test_all_of_it(self) -> None:
        driver = Driver(m=policy(concurrency=2))
        first = driver.leased()
        second, _ = driver.acquire()
        driver.unload()
        assert driver.release(first) == []
        assert stopped(driver.release(second)) == ["m"]

    def test_but_not_longer_than_its_deadline(self) -> None:
        driver = Driver(m=policy(drain_timeout=30))
        driver.leased()
        driver.unload()
        assert driver.after(29.9) == []
        assert stopped(driver.after(0.1)) == ["m"]
        assert driver.state() == "stopping"

    def test_force_waits_for_nobody(self) -> None:
        driver = Driver()
        driver.leased()
        _, found = driver.unload(force=True)
        assert stopped(found) == ["m"]

    def test_force_ends_a_drain(self) -> None:
        driver = Driver()
        driver.leased()
        first, _ = driver.unload()
        second, found = driver.unload(force=True)
        assert stopped(found) == ["m"]
        assert done(driver.gone()) == [first, second]

    def test_a_second_unload_does_not_prolong_the_drain(self) -> None:
        driver = Driver(m=policy(drain_timeout=30))
        driver.leased()
        driver.unload()
        driver.after(20)
        driver.unload()
        assert stopped(driver.after(10)) == ["m"]

    def test_who_waited_is_called_off_and_who_comes_later_loads_again(self) -> None:
        driver = Driver()
        lease = driver.leased()
        before, _ = driver.acquire()
        _, found = driver.unload()
        assert rejected(found) == {before: "unloaded"}
        later, found = driver.acquire()
        assert found == []
        driver.release(lease)
        assert spawned(driver.gone()) == ["m"]
        assert granted(driver.ready()) == [later]

    def test_while_starting_it_ends_the_load_at_once(self) -> None:
        driver = Driver()
        waiting, _ = driver.acquire()
        loading, _ = driver.load()
        ticket, found = driver.unload()
        assert rejected(found) == {waiting: "unloaded", loading: "unloaded"}
        assert stopped(found) == ["m"]
        assert driver.ready() == []
        assert done(driver.gone()) == [ticket]
        assert driver.state() == "stopped"

    def test_load_unload_and_request_in_one_go_end_in_the_last_wish(self) -> None:
        driver = Driver()
        loading, found = driver.load()
        unloading, more = driver.unload()
        wanted, yet_more = driver.acquire()
        assert spawned([*found, *more, *yet_more]) == ["m"]
        assert rejected(more) == {loading: "unloaded"}
        found = driver.gone()
        assert done(found) == [unloading]
        assert spawned(found) == ["m"]
        assert granted(driver.ready()) == [wanted]

    def test_a_second_unload_calls_off_who_came_in_between(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        between, _ = driver.acquire()
        _, found = driver.unload()
        assert rejected(found) == {between: "unloaded"}
        assert spawned(driver.gone()) == []

    def test_two_stops_are_one(self) -> None:
        driver = Driver()
        driver.loaded()
        _, first = driver.unload()
        _, second = driver.unload(force=True)
        assert stopped([*first, *second]) == ["m"]

    def test_who_left_the_unload_is_told_nothing_and_it_goes_on(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, _ = driver.unload()
        driver.cancel(ticket)
        assert answered(driver.gone()) == []
        assert driver.state() == "stopped"

    def test_a_drained_model_whose_runner_dies_is_gone(self) -> None:
        driver = Driver()
        driver.leased()
        ticket, _ = driver.unload()
        assert done(driver.gone(RunnerDied("killed"))) == [ticket]
        assert driver.scheduler.wake_at() is None
