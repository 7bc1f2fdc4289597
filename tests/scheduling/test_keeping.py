"""What a keep-alive is worth when somebody has to go: what a request asked for counts, and what is left of it."""

from __future__ import annotations

from mlxsup.scheduling import events as ev
from mlxsup.scheduling.credit import LONGEST, REVIEW, Credit
from mlxsup.scheduling.eviction import Worth
from mlxsup.simulation import RIVALS

from .driving import GIB, Short, model, stopped


def used(driver: Short, name: str, keep_alive: float | None = None) -> None:
    """Have a model used once, with this wish."""
    ticket = 900 + len(driver.scheduler.idle)
    driver.tell(ev.Acquire(ticket, name, keep_alive))
    if driver.state(name) != "ready":
        driver.ready(name)
    driver.release(ticket, name)


def test_what_a_request_asked_for_counts_and_not_what_is_configured() -> None:
    for asked in (-1, 3600):
        driver = Short(2, a=model(1, keep_alive=1), b=model(1, keep_alive=600), c=model(1))
        used(driver, "a", asked)
        used(driver, "b")
        assert driver.scheduler.idle == ["b", "a"]
        assert stopped(driver.acquire("c")[1]) == ["b"]


def test_what_is_configured_counts_where_nobody_asked() -> None:
    driver = Short(2, a=model(1, keep_alive=3000), b=model(1, keep_alive=10), c=model(1))
    used(driver, "a")
    used(driver, "b")
    assert stopped(driver.acquire("c")[1]) == ["b"]


def test_it_is_what_is_left_that_counts() -> None:
    driver = Short(2, a=model(1, keep_alive=3600), b=model(1, keep_alive=-1), c=model(1))
    used(driver, "b")
    used(driver, "a")
    assert driver.scheduler.idle == ["b", "a"]
    driver.after(3300)
    assert stopped(driver.acquire("c")[1]) == ["a"]
    reason = driver.view("a").reason
    assert "uses x 1.04 / 1 GiB" in reason, "300 of 3600 s are left"


def test_the_order_is_reviewed_as_time_goes_even_where_nothing_is_asked_for() -> None:
    driver = Short(2, a=model(1, keep_alive=3600), b=model(1, keep_alive=-1))
    used(driver, "b")
    used(driver, "a")
    driver.sampled(2)
    assert driver.scheduler.idle == ["b", "a"]
    driver.after(3000)
    driver.sampled(2)
    assert driver.scheduler.idle == ["a", "b"]
    assert stopped(driver.sampled(-0.5, a=1, b=1)) == ["a"]


def test_a_key_is_good_for_a_while() -> None:
    order = Credit()
    assert order.epoch(10 * REVIEW) == order.epoch(11 * REVIEW - 1)
    assert order.epoch(11 * REVIEW) != order.epoch(10 * REVIEW)
    assert RIVALS["LRU by bytes"].order().epoch(0) == RIVALS["LRU by bytes"].order().epoch(1e9)


def test_for_ever_is_worth_half_as_much_again_as_nothing_and_longer_is_worth_no_more() -> None:
    order = Credit()

    def credit(keep_alive: float) -> float:
        return 2 ** order.key("m", Worth(seconds=1, size=GIB, keep_alive=keep_alive), 0)

    assert credit(0) == 1
    assert credit(LONGEST / 2) == 1.25
    assert credit(LONGEST) == credit(-1) == credit(10 * LONGEST) == 1.5


class TestLoadsNobodyWaitsFor:
    """Who asked for a load has left before its end: it goes on, and so does what was asked for with it."""

    def test_the_wish_that_came_with_it_holds(self) -> None:
        driver = Short(2, a=model(1, keep_alive=5.0))
        driver.tell(ev.Load(1, "a", -1.0))
        driver.cancel(1, "a")
        driver.ready("a")
        driver.after(100)
        assert driver.state("a") == "ready"

    def test_without_a_wish_that_of_another_holds(self) -> None:
        driver = Short(2, a=model(1, keep_alive=5.0))
        driver.tell(ev.Load(1, "a", -1.0), ev.Load(2, "a"))
        driver.cancel(1, "a")
        driver.cancel(2, "a")
        driver.ready("a")
        driver.after(100)
        assert driver.state("a") == "ready"

    def test_it_stays_until_it_has_been_used(self) -> None:
        driver = Short(2, a=model(1, keep_alive=0.0))
        driver.cancel(driver.load("a")[0], "a")
        driver.ready("a")
        driver.after(100)
        assert driver.state("a") == "ready"
        ticket, _ = driver.acquire("a")
        assert stopped(driver.release(ticket, "a")) == ["a"]

    def test_a_request_that_left_had_no_wish_of_the_kind(self) -> None:
        driver = Short(2, a=model(1, keep_alive=0.0))
        driver.cancel(driver.acquire("a")[0], "a")
        assert stopped(driver.ready("a")) == ["a"]

    def test_one_that_waits_for_memory_is_given_up(self) -> None:
        driver = Short(1, a=model(1, keep_alive=5.0), busy=model(1))
        lease = driver.leased("busy")
        driver.tell(ev.Load(1, "a", -1.0))
        driver.cancel(1, "a")
        assert stopped(driver.release(lease, "busy")) == []
        assert not driver.view("a").claimed
