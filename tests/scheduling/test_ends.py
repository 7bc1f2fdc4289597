"""Runners that die, stick or come late, and the end of everything."""

from __future__ import annotations

import pytest

from mlxsup.errors import RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev

from .driving import Driver, answered, broken, changes, done, granted, only, policy, rejected, spawned, stopped


class TestDeath:
    def test_an_idle_runner_that_dies_is_not_started_again_by_itself(self) -> None:
        driver = Driver()
        driver.loaded()
        assert spawned(driver.gone(RunnerDied("SIGKILL"))) == []
        assert driver.state() == "failed"
        assert str(driver.view().error) == "SIGKILL"
        assert driver.scheduler.wake_at() is None

    @pytest.mark.parametrize("told_first", [True, False])
    def test_who_waits_behind_the_victim_gets_the_next_process(self, told_first: bool) -> None:
        driver = Driver()
        driver.leased()
        waiting, _ = driver.acquire()
        found = driver.failing(RunnerDied("SIGKILL")) if told_first else []
        found += driver.gone(RunnerDied("SIGKILL"))
        assert only(found, fx.Spawn) == [fx.Spawn("m", 2)]
        assert rejected(found) == {}
        assert granted(driver.ready()) == [waiting]

    def test_nobody_is_granted_a_runner_that_is_known_to_be_dead(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.failing(RunnerDied("SIGKILL"))
        ticket, found = driver.acquire()
        assert answered(found) == []
        found = driver.gone(RunnerDied("SIGKILL"))
        assert spawned(found) == ["m"]
        assert granted(driver.ready()) == [ticket]

    def test_leases_of_the_dead_are_over(self) -> None:
        driver = Driver()
        driver.leased()
        driver.gone(RunnerDied("SIGKILL"))
        assert driver.view().leases == 0

    def test_exits_are_counted(self) -> None:
        driver = Driver()
        for error in (None, broken(), RunnerDied("x")):
            driver.acquire()
            driver.gone(error)
        assert driver.view().exits == 3

    def test_it_dies_while_it_is_asked_to_stop(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, _ = driver.unload()
        assert driver.failing(RunnerDied("SIGSEGV")) == []
        assert done(driver.gone(RunnerDied("SIGSEGV"))) == [ticket]


class TestLateNews:
    """What an earlier generation has to say is ignored."""

    @pytest.mark.parametrize("state", ["stopped", "starting", "ready", "draining", "stopping"])
    @pytest.mark.parametrize(
        "late",
        [
            ev.Ready("m", 1),
            ev.Gone("m", 1),
            ev.Gone("m", 1, broken()),
            ev.Failing("m", 1, broken()),
            ev.Stuck("m", 1, [7]),
        ],
        ids=lambda event: type(event).__name__,
    )
    def test_in_each_state(self, state: str, late: ev.Event) -> None:
        driver = Driver()
        driver.load()
        driver.unload()
        driver.gone()
        if state != "stopped":
            driver.acquire()
        if state in ("ready", "draining"):
            driver.ready()
        if state in ("draining", "stopping"):
            driver.unload()
        assert driver.state() == state
        before = driver.view()
        assert driver.tell(late) == []
        assert driver.view() == before

    def test_ready_after_the_stop_is_too_late(self) -> None:
        driver = Driver()
        driver.load()
        driver.unload()
        assert driver.ready() == []
        assert driver.state() == "stopping"

    def test_gone_twice_is_once(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.gone(RunnerDied("x"))
        assert driver.gone(RunnerDied("x")) == []
        assert driver.view().exits == 1


class TestStuck:
    """A process that was sent SIGKILL and is still there."""

    def test_waiters_are_told_at_once_and_so_is_who_comes(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        waiting, _ = driver.acquire()
        found = driver.stuck()
        assert rejected(found) == {waiting: "backoff"}
        assert changes(found) == [("stopping", "stuck")]
        for ask in (driver.acquire, driver.load):
            ticket, found = ask()
            assert rejected(found) == {ticket: "backoff"}
            error = only(found, fx.Reject)[0].error
            assert error.retry_after
            assert error.details["pids"] == [4711]

    def test_it_is_loaded_again_when_it_is_gone_after_all(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, _ = driver.unload()
        driver.stuck()
        assert done(driver.gone()) == [ticket]
        assert driver.state() == "stopped"
        assert spawned(driver.acquire()[1]) == ["m"]

    def test_said_twice_is_one_transition(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        driver.stuck()
        assert only(driver.stuck(), fx.Changed) == []

    @pytest.mark.parametrize("failing", [True, False], ids=["failing told", "failing not told"])
    def test_timers_of_a_stuck_process_do_not_fire_for_ever(self, failing: bool) -> None:
        """An idle one died and left something that does not go: its keep-alive would come due again and again."""
        driver = Driver(m=policy(keep_alive=60))
        driver.loaded()
        if failing:
            driver.failing(RunnerDied("SIGKILL"))
        driver.stuck()
        assert stopped(driver.after(120)) == []
        assert driver.state() == "stuck"

    def test_a_drain_deadline_does_not_unstick_it(self) -> None:
        driver = Driver(m=policy(drain_timeout=30))
        driver.leased()
        driver.unload()
        driver.stuck()
        driver.after(60)
        assert driver.state() == "stuck"

    def test_a_shutdown_waits_for_it(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        driver.stuck()
        assert driver.tell(ev.Shutdown()) == []
        assert driver.gone() == [fx.Done(2), fx.Changed("m", "stuck", "stopped", 1, "gone"), fx.Closed()]


class TestShutdown:
    def test_with_nothing_loaded_it_is_closed_at_once(self) -> None:
        assert Driver().tell(ev.Shutdown()) == [fx.Closed()]

    @pytest.mark.parametrize("force", [True, False])
    def test_a_load_is_given_up(self, force: bool) -> None:
        driver = Driver()
        waiting, _ = driver.acquire()
        loading, _ = driver.load()
        found = driver.tell(ev.Shutdown(force=force))
        assert rejected(found) == {waiting: "shutting_down", loading: "shutting_down"}
        assert stopped(found) == ["m"]
        assert driver.gone()[-1] == fx.Closed()

    def test_idle_ones_are_stopped_side_by_side(self) -> None:
        driver = Driver(a=policy(), b=policy(), c=policy())
        driver.loaded("a")
        driver.loaded("b")
        assert stopped(driver.tell(ev.Shutdown())) == ["a", "b"]
        assert fx.Closed() not in driver.gone(model="b")
        assert fx.Closed() in driver.gone(model="a")

    def test_work_in_flight_ends_first_but_not_later_than_its_deadline(self) -> None:
        driver = Driver(m=policy(drain_timeout=30))
        driver.leased()
        found = driver.tell(ev.Shutdown())
        assert changes(found) == [("ready", "draining")]
        assert stopped(driver.after(30)) == ["m"]
        assert fx.Closed() in driver.gone()

    def test_the_last_release_ends_the_drain(self) -> None:
        driver = Driver()
        lease = driver.leased()
        driver.tell(ev.Shutdown())
        assert stopped(driver.release(lease)) == ["m"]

    def test_force_comes_after_patience(self) -> None:
        driver = Driver()
        driver.leased()
        driver.tell(ev.Shutdown())
        assert stopped(driver.tell(ev.Shutdown(force=True))) == ["m"]
        assert driver.tell(ev.Shutdown(force=True)) == []

    def test_who_comes_late_is_refused(self) -> None:
        driver = Driver()
        driver.leased()
        driver.tell(ev.Shutdown())
        for ask in (driver.acquire, driver.load):
            ticket, found = ask()
            assert rejected(found) == {ticket: "shutting_down"}

    def test_who_waited_behind_a_lease_is_refused_at_once(self) -> None:
        driver = Driver()
        driver.leased()
        waiting, _ = driver.acquire()
        assert rejected(driver.tell(ev.Shutdown())) == {waiting: "shutting_down"}

    def test_an_unload_under_way_is_answered_before_the_end(self) -> None:
        driver = Driver()
        driver.loaded()
        ticket, _ = driver.unload()
        driver.tell(ev.Shutdown())
        found = driver.gone()
        assert found.index(fx.Done(ticket)) < found.index(fx.Closed())

    def test_nothing_is_loaded_again_for_who_came_while_it_went(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        waiting, _ = driver.acquire()
        assert rejected(driver.tell(ev.Shutdown())) == {waiting: "shutting_down"}
        assert spawned(driver.gone()) == []

    def test_a_runner_that_fails_meanwhile_is_no_obstacle(self) -> None:
        driver = Driver()
        driver.load()
        driver.tell(ev.Shutdown())
        assert fx.Closed() in driver.gone(broken())

    def test_closed_is_said_once(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.tell(ev.Shutdown())
        assert driver.gone().count(fx.Closed()) == 1
        assert driver.tell(ev.Shutdown(), ev.Shutdown(force=True), ev.Tick()) == []
