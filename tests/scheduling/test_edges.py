"""What is easily forgotten: old news of memory, wishes of those who never came in, drains that are not for others."""

from __future__ import annotations

from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits

from .driving import GIB, Short, broken, granted, model, only, rejected, spawned, stopped


def test_a_look_at_an_earlier_process_counts_for_nothing() -> None:
    driver = Short(4, a=model(1))
    driver.loaded("a")
    assert driver.tell(ev.Sampled({}, {"a": (0, {"cpu": 3 * GIB})})) == []
    assert driver.view("a").reserved == {"cpu": GIB}
    assert driver.tell(ev.Sampled({}, {"nobody": (1, {"cpu": GIB})})) == []


def test_an_idle_one_goes_rather_than_that_somebody_waits_for_a_long_drain() -> None:
    driver = Short(2, a=model(1), b=model(1), c=model(1))
    driver.leased("a")
    driver.unload("a")
    driver.loaded("b")
    assert driver.state("a") == "draining"
    assert stopped(driver.acquire("c")[1]) == ["b"]


def test_an_unload_ends_the_wishes_of_earlier_requests() -> None:
    driver = Short(1, a=model(1))
    driver.tell(ev.Acquire(50, "a", 5.0))
    driver.unload("a")
    driver.gone(model="a")
    driver.loaded("a")
    assert driver.view("a").expires == driver.now + 600


def test_an_unload_makes_what_was_beyond_help_be_tried_again() -> None:
    driver = Short(1, a=model(1))
    driver.acquire("a")
    driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
    assert rejected(driver.acquire("a")[1])
    driver.unload("a")
    assert spawned(driver.acquire("a")[1]) == ["a"]


def test_a_request_before_its_backoff_ends_is_explained() -> None:
    driver = Short(1, a=model(1))
    driver.acquire("a")
    driver.gone(broken(), "a")
    assert driver.explained("a") == "queued: started again in 0.5 s after: no such file"
    assert driver.scheduler.explain("a", driver.now + 0.5).startswith("loaded at once: a needs 1.0 GiB")


def test_what_fails_is_told_before_it_is_gone() -> None:
    driver = Short(1, a=model(1))
    driver.loaded("a")
    driver.failing(RunnerDied("SIGKILL"), "a")
    assert str(driver.view("a").error) == "SIGKILL"


def test_other_limits_hold_from_the_change_of_the_configuration_on() -> None:
    driver = Short(1, a=model(1), b=model(1))
    driver.loaded("a")
    driver.tell(
        ev.Reconfigure(
            policies={"a": model(1), "b": model(1)},
            queue=1,
            limits=Limits(min_residency=5),
            devices=(Device(name="cpu", total=GIB),),
        )
    )
    assert stopped(driver.acquire("b")[1]) == []
    assert rejected(driver.acquire("b")[1])
    assert stopped(driver.after(5.1)) == ["a"]


def test_who_waits_for_memory_waits_for_what_it_needs_now() -> None:
    driver = Short(2, busy=model(1), large=model(2))
    driver.leased("busy")
    waiting, found = driver.acquire("large")
    assert spawned(found) == []
    policies = {"busy": model(1), "large": model(1)}
    found = driver.tell(
        ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=(Device(name="cpu", total=2 * GIB),))
    )
    assert spawned(found) == ["large"]
    assert granted(driver.ready("large")) == [waiting]


def test_nobody_is_kept_from_leaving_a_model_that_is_not_there() -> None:
    driver = Short(1, a=model(1))
    assert driver.tell(ev.Unload(9, "nobody")) == [fx.Done(9)]
    assert rejected(driver.tell(ev.Load(10, "nobody"))) == {10: "model_not_found"}
    assert driver.tell(ev.Cancel(9, "nobody"), ev.Release(9, "nobody")) == []


def test_the_minimum_of_a_device_is_told_apart_from_what_it_has() -> None:
    driver = Short(devices=(Device(name="cpu", total=4 * GIB, minimum=GIB, overhead=GIB),), a=model(3))
    error = only(driver.acquire("a")[1], fx.Reject)[0].error
    assert error.message == "model requires 3.0 GiB but only 2.0 GiB are available (after 2.0 GiB overhead)"
    assert error.details["overhead"] == 2 * GIB


def test_a_copy_goes_its_own_way() -> None:
    driver = Short(2, a=model(1), b=model(1))
    driver.loaded("a")
    other = driver.scheduler.copy()
    assert [type(effect) for effect in other.handle(ev.Acquire(99, "b"), driver.now)] == [fx.Changed, fx.Spawn]
    assert driver.state("b") == "stopped"
    assert spawned(driver.acquire("b")[1]) == ["b"]


def test_a_busy_one_that_came_just_now_is_not_drained_before_it_has_been_there_for_a_while() -> None:
    driver = Short(1, Limits(min_residency=5, patience=15), a=model(1), b=model(1))
    driver.acquire("a")
    driver.acquire("b")
    driver.after(16)
    driver.ready("a")
    assert driver.state("a") == "ready"
    driver.after(4.9)
    assert driver.state("a") == "ready"
    driver.after(0.2)
    assert driver.state("a") == "draining"


def test_a_model_that_is_removed_while_nothing_runs_is_forgotten_at_once() -> None:
    driver = Short(1, a=model(1), b=model(1))
    found = driver.tell(
        ev.Reconfigure(policies={"a": model(1)}, queue=9, limits=Limits(), devices=(Device(name="cpu", total=GIB),))
    )
    assert only(found, fx.Forget) == [fx.Forget("b")]
    assert driver.scheduler.models == ["a"]


def test_who_shall_come_back_and_is_removed_meanwhile_does_not() -> None:
    driver = Short(1, home=model(1, comes_back=True), guest=model(1))
    driver.loaded("home")
    driver.load("guest")
    driver.gone(model="home")
    driver.ready("guest")
    policies = {"guest": model(1)}
    driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=(Device(name="cpu", total=GIB),)))
    driver.unload("guest")
    assert spawned(driver.gone(model="guest")) == []


def test_one_pinned_by_a_new_configuration_stays() -> None:
    driver = Short(1, a=model(1), b=model(1))
    driver.loaded("a")
    policies = {"a": model(1, pinned=True), "b": model(1)}
    driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=(Device(name="cpu", total=GIB),)))
    ticket, found = driver.acquire("b")
    assert rejected(found) == {ticket: "does_not_fit"}
    assert stopped(found) == []
    assert driver.scheduler.idle == []
    assert driver.view("a").expires is None


def test_one_unpinned_by_a_new_configuration_may_go() -> None:
    driver = Short(1, a=model(1, pinned=True), b=model(1))
    driver.loaded("a")
    policies = {"a": model(1), "b": model(1)}
    driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=(Device(name="cpu", total=GIB),)))
    assert stopped(driver.acquire("b")[1]) == ["a"]


def test_the_time_of_loads_is_learnt() -> None:
    driver = Short(2, quick=model(1), slow=model(1), new=model(1))
    driver.load("slow")
    driver.after(20)
    driver.ready("slow")
    driver.load("quick")
    driver.after(2)
    driver.ready("quick")
    assert driver.scheduler.idle == ["quick", "slow"]
    assert "quick (credit" in driver.explained("new")
    assert "reload 2 s" in driver.explained("new")
