"""What becomes of those who wait when a load fails, and of a model that fails again and again."""

from __future__ import annotations

import pytest

from mlxsup.errors import RunnerDied
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.backoff import Backoff, Breaker
from mlxsup.scheduling.scheduler import Limits

from .driving import Short, broken, changes, model, rejected, stopped


class TestFailures:
    def test_a_second_request_changes_nothing_of_the_wait(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        driver.acquire("a")
        assert driver.acquire("a")[1] == []
        assert driver.view("a").retry_at == driver.scheduler.wake_at() == driver.now + 0.5

    def test_when_it_is_tried_again_is_seen_while_it_waits_for_that(self) -> None:
        driver = Short(1, a=model(1))
        assert driver.view("a").retry_at is None
        driver.acquire("a")
        driver.gone(broken(), "a")
        assert driver.view("a").retry_at is None
        ticket, _ = driver.acquire("a")
        assert driver.view("a").retry_at == driver.now + 0.5
        driver.cancel(ticket, "a")
        assert driver.view("a").retry_at is None
        assert driver.scheduler.wake_at() is None

    def test_who_is_removed_while_it_waits_is_not_tried_again(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        driver.acquire("a")
        driver.tell(ev.Reconfigure(policies={}, queue=9, limits=Limits()))
        assert driver.scheduler.wake_at() is None

    def test_a_runner_that_dies_while_it_is_drained_is_known_to_be_of_no_use(self) -> None:
        driver = Short(1, a=model(1))
        driver.leased("a")
        driver.unload("a")
        assert changes(driver.failing(RunnerDied("SIGKILL"), "a")) == [("draining", "stopping")]

    @pytest.mark.parametrize(("well", "wait"), [(9.9, 1.0), (10.0, 0.5)])
    def test_ten_seconds_of_health_make_earlier_failures_forgotten(self, well: float, wait: float) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        driver.after(1)
        driver.loaded("a")
        driver.after(well)
        driver.gone(RunnerDied("SIGKILL"), "a")
        driver.acquire("a")
        assert driver.view("a").retry_at == pytest.approx(driver.now + wait)

    def test_an_unload_makes_earlier_failures_forgotten(self) -> None:
        driver = Short(1, Limits(backoff=Backoff(failures=2)), a=model(1))
        for _ in range(2):
            driver.load("a")
            driver.after(5)
            driver.gone(broken(), "a")
            driver.after(5)
        driver.unload("a")
        driver.acquire("a")
        assert rejected(driver.gone(broken(), "a")) != {}
        assert rejected(driver.acquire("a")[1]) == {}
        assert driver.view("a").retry_at == driver.now + 0.5

    def test_what_came_of_the_others_is_told_in_the_same_moment(self) -> None:
        """Two are due at once: neither is forgotten for the other."""
        driver = Short(2, a=model(1, keep_alive=5.0), b=model(1, keep_alive=5.0))
        driver.loaded("a")
        driver.loaded("b")
        assert stopped(driver.after(5)) == ["a", "b"]


class TestBreaker:
    def fail(self, *moments: float, failures: int = 3) -> Breaker:
        breaker = Breaker(Backoff(failures=failures, window=60.0))
        for now in moments:
            breaker.failed(now, 0.0)
        return breaker

    def test_it_opens_when_so_many_failures_come_within_its_window(self) -> None:
        assert not self.fail(0, 1).open
        assert self.fail(0, 1, 60).open
        assert not self.fail(0, 1, 60.5).open
        assert self.fail(0, 50, 60.5, 110).open
        assert not self.fail(0, 50, 100, 150, 200).open

    def test_it_closes_when_the_model_works(self) -> None:
        breaker = self.fail(0, 1, 2)
        breaker.ready(30)
        assert not breaker.open
        breaker.failed(31, 0.0)
        assert breaker.open, "failures of late are not forgotten before it was well for a while"

    def test_it_begins_anew_where_that_is_wanted(self) -> None:
        breaker = self.fail(0, 1, 2)
        breaker.forget()
        assert (breaker.open, breaker.streak, breaker.retry_at) == (False, 0, float("-inf"))
        breaker.failed(10, 0.0)
        assert (breaker.open, breaker.streak, breaker.retry_at) == (False, 1, 10.5)

    def test_it_counts_on_however_long_it_goes_on(self) -> None:
        breaker = self.fail(*range(0, 200_000, 100))
        assert breaker.streak == 2000
        assert breaker.retry_at == 199_900 + 30
