"""Who is in use and was to make room: it goes on as before when nobody needs its room any more, and not sooner."""

from __future__ import annotations

import pytest

from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits

from .driving import GIB, Short, changes, done, granted, model, only, spawned, stopped

BACK = [("draining", "ready")]


def drained(gib: float = 1, *, wanting: str = "b", busy: int = 1, **policies: object) -> tuple[Short, int, list[int]]:
    """`a` is in use and takes no new work, for `wanting` has waited long enough; returns its ticket and the leases of `a`."""
    models = {"a": model(1, concurrency=4), "b": model(1), **policies}
    driver = Short(gib, **models)  # type: ignore[arg-type]
    leases = [driver.leased("a") if not number else driver.acquire("a")[0] for number in range(busy)]
    ticket, _ = driver.acquire(wanting)
    assert ("ready", "draining") in changes(driver.after(15))
    return driver, ticket, leases


def test_when_the_last_who_waited_leaves_it_takes_requests_again() -> None:
    driver, ticket, _ = drained()
    behind, found = driver.acquire("a")
    assert granted(found) == []
    found = driver.cancel(ticket, "b")
    assert changes(found) == [("draining", "ready")]
    assert granted(found) == [behind]
    assert granted(driver.acquire("a")[1])
    assert driver.view("a").parting == ""
    assert driver.view("a").reason == "its memory is not needed any more"


def test_who_wanted_it_loaded_meanwhile_is_told_that_it_is() -> None:
    driver, ticket, _ = drained()
    loading = driver.load("a")[0]
    assert done(driver.cancel(ticket, "b")) == [loading]
    assert driver.view("a").waiting == 0


def test_it_rests_and_goes_as_any_other_after_that() -> None:
    driver, ticket, (lease,) = drained()
    driver.cancel(ticket, "b")
    driver.release(lease, "a")
    assert driver.scheduler.idle == ["a"]
    assert stopped(driver.acquire("b")[1]) == ["a"]
    assert spawned(driver.gone(model="a")) == ["b"]


def test_it_is_drained_again_for_the_next_who_has_waited_long_enough() -> None:
    driver, ticket, (lease,) = drained()
    driver.cancel(ticket, "b")
    driver.acquire("b")
    assert changes(driver.after(14.9)) == []
    assert changes(driver.after(0.2)) == [("ready", "draining")]
    assert stopped(driver.release(lease, "a")) == ["a"]


def test_another_of_those_who_wait_keeps_it_draining() -> None:
    driver, ticket, _ = drained()
    other, _ = driver.acquire("b")
    assert driver.cancel(ticket, "b") == []
    assert changes(driver.cancel(other, "b")) == BACK


def test_another_model_that_counts_on_its_room_keeps_it_draining() -> None:
    driver, ticket, (lease,) = drained(c=model(1))
    driver.acquire("c")
    assert changes(driver.cancel(ticket, "b")) == []
    assert driver.state("a") == "draining"
    assert stopped(driver.release(lease, "a")) == ["a"]
    assert spawned(driver.gone(model="a")) == ["c"]


def test_room_that_comes_from_elsewhere_is_enough_for_who_waits() -> None:
    driver = Short(2, a=model(1, concurrency=2), b=model(1), c=model(1))
    driver.leased("a")
    driver.leased("c")
    waiting, _ = driver.acquire("b")
    (gone,) = [each.model for each in only(driver.after(15), fx.Changed)]
    stays = "c" if gone == "a" else "a"
    driver.unload(stays, force=True)
    assert spawned(driver.gone(model=stays)) == ["b"]
    assert driver.state(gone) == "ready"
    assert granted(driver.ready("b")) == [waiting]


def test_of_several_only_those_go_on_who_are_not_needed() -> None:
    driver = Short(2, a=model(1), b=model(1), big=model(2), small=model(1))
    driver.leased("a")
    driver.leased("b")
    ticket, _ = driver.acquire("big")
    driver.after(15)
    assert {driver.state("a"), driver.state("b")} == {"draining"}
    driver.acquire("small")
    found = driver.cancel(ticket, "big")
    assert changes(found) == BACK
    assert sorted([driver.state("a"), driver.state("b")]) == ["draining", "ready"]


def test_who_has_to_go_for_another_reason_too_goes() -> None:
    driver, ticket, (lease,) = drained()
    driver.unload("a")
    assert driver.cancel(ticket, "b") == []
    assert stopped(driver.release(lease, "a")) == ["a"]


def test_one_that_was_told_to_stop_stops() -> None:
    driver, ticket, (lease,) = drained()
    assert stopped(driver.release(lease, "a")) == ["a"]
    assert driver.cancel(ticket, "b") == []
    assert driver.state("a") == "stopping"


def test_a_device_that_is_short_gets_its_memory_all_the_same() -> None:
    driver, ticket, (lease,) = drained(2, b=model(2))
    driver.sampled(0, a=2.5)
    assert driver.cancel(ticket, "b") == []
    assert driver.state("a") == "draining"
    assert changes(driver.sampled(2, a=1)) == BACK
    driver.release(lease, "a")
    assert driver.scheduler.idle == ["a"]


def test_who_waits_for_other_programs_keeps_what_makes_room_for_it() -> None:
    driver, _, _ = drained(2, b=model(2))
    driver.sampled(1, a=1)
    assert changes(driver.sampled(0.5, a=1)) == []
    assert driver.state("a") == "draining"


@pytest.mark.parametrize("need", [0.5, 1])
def test_a_place_among_max_loaded_is_room_like_memory(need: float) -> None:
    driver = Short(8, Limits(max_loaded=1), a=model(1, concurrency=2), b=model(need))
    driver.leased("a")
    ticket, _ = driver.acquire("b")
    assert changes(driver.after(15)) == [("ready", "draining")]
    assert changes(driver.cancel(ticket, "b")) == BACK
    assert driver.scheduler.ledger.accounts["places"].departing == 0


def test_it_does_not_come_back_by_itself_as_if_it_had_gone_for_a_guest() -> None:
    driver, ticket, (lease,) = drained(a=model(1, concurrency=4, comes_back=True))
    driver.cancel(ticket, "b")
    driver.release(lease, "a")
    assert stopped(driver.after(600)) == ["a"]
    assert spawned(driver.gone(model="a")) == []
    assert spawned(driver.after(600)) == []


def test_a_need_that_is_being_looked_up_anew_frees_nobody() -> None:
    """As after a change of the configuration: the claim stays, and for how much is not known for a moment."""
    driver = Short(1, a=model(1), b=model(memory=None))
    driver.leased("a")
    driver.acquire("b")
    driver.tell(ev.Weighed("b", 1, GIB))
    assert changes(driver.after(15)) == [("ready", "draining")]
    policies = {"a": model(1), "b": model(memory=None)}
    devices = (Device(name="cpu", total=GIB),)
    change = ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=devices, restart=frozenset({"b"}))
    driver.tell(change)
    assert driver.view("b").weighing
    assert driver.state("a") == "draining"
    assert changes(driver.tell(ev.Weighed("b", 2, GIB))) == []
    assert driver.state("a") == "draining"
