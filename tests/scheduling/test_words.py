"""What people read: why a model changed its state, what an error says."""

from __future__ import annotations

import pytest

from mlxsup.errors import MlxsupError, RunnerDied
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.backoff import Backoff
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy

from .driving import GIB, Driver, Short, broken, model, only, policy


def reasons(found: list[fx.Effect]) -> list[str]:
    return [effect.reason for effect in only(found, fx.Changed)]


def errors(found: list[fx.Effect]) -> list[MlxsupError]:
    return [effect.error for effect in only(found, fx.Reject)]


class TestWhyItChanged:
    def test_from_a_request_to_its_end(self) -> None:
        driver = Driver(m=policy(keep_alive=90))
        ticket, found = driver.acquire()
        assert found == [fx.Changed("m", "stopped", "starting", 1, "asked for"), fx.Spawn("m", 1, {})]
        assert driver.ready()[0] == fx.Changed("m", "starting", "ready", 1, "loaded")
        driver.release(ticket)
        assert driver.after(90) == [fx.Changed("m", "ready", "stopping", 1, "idle for 90 s"), fx.Stop("m", 1)]
        assert driver.gone() == [fx.Changed("m", "stopping", "stopped", 1, "gone")]
        assert driver.view().reason == "gone"
        assert driver.view().parting == "idle for 90 s"

    def test_a_load(self) -> None:
        assert reasons(Driver().load()[1]) == ["load asked for"]

    def test_a_preload(self) -> None:
        assert reasons(Short(1, a=model(1, preload=True)).tell(ev.Start())) == ["preloaded"]

    def test_asked_for_while_it_went(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        driver.acquire()
        assert reasons(driver.gone()) == ["gone", "asked for while it went"]

    def test_a_pinned_one_that_crashed(self) -> None:
        driver = Driver(m=Policy(keep_alive=0, concurrency=1, queue=1, drain_timeout=1, pinned=True))
        driver.loaded()
        assert reasons(driver.gone(RunnerDied("SIGKILL"))) == ["SIGKILL", "pinned, and crashed"]

    def test_there_is_room_again(self) -> None:
        driver = Short(1, home=model(1, comes_back=True), guest=model(1))
        driver.loaded("home")
        driver.load("guest")
        driver.gone(model="home")
        driver.ready("guest")
        driver.unload("guest")
        assert reasons(driver.gone(model="guest")) == ["gone", "there is room for it again"]

    def test_backoff_and_the_next_try(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        assert reasons(driver.gone(broken(), "a")) == ["no such file"]
        assert reasons(driver.acquire("a")[1]) == ["started again in 0.5 s after: no such file"]
        assert reasons(driver.after(0.5)) == ["tried again after a failure"]

    def test_nobody_waits_for_the_next_try(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        ticket, _ = driver.acquire("a")
        assert reasons(driver.cancel(ticket, "a")) == ["nobody waits for it any more"]

    def test_what_can_never_come_back_any_more(self) -> None:
        driver = Short(2, a=model(2, pinned=True), p=model(1, pinned=True))
        driver.loaded("p")
        driver.acquire("a")
        assert driver.state("a") == "backoff"
        policies = {"a": model(2, pinned=True), "p": model(1, pinned=True)}
        devices = (Device(name="cpu", total=GIB),)
        driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(), devices=devices))
        (why,) = reasons(driver.after(1))
        refusal = "model requires 2.0 GiB but only 1.0 GiB are available (after 0 B overhead)"
        assert why == f"not loaded again: {refusal}"
        assert driver.state("a") == "failed"
        assert driver.after(1000) == []

    def test_why_it_goes_is_known_until_it_is_there_again(self) -> None:
        driver = Driver()
        lease = driver.leased()
        driver.unload()
        assert driver.view().parting == "unload asked for"
        driver.release(lease)
        driver.gone()
        assert driver.view().parting == "drained"
        driver.load()
        assert driver.view().parting == ""

    def test_not_kept_alive(self) -> None:
        driver = Driver(m=policy(keep_alive=0))
        assert reasons(driver.release(driver.leased())) == ["not kept alive"]

    def test_an_unload(self) -> None:
        driver = Driver()
        driver.loaded()
        assert reasons(driver.unload()[1]) == ["unload asked for"]

    def test_an_unload_while_it_waits_for_its_next_try(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        driver.acquire("a")
        assert reasons(driver.unload("a")[1]) == ["unload asked for"]
        assert driver.state("a") == "stopped"

    def test_a_drain_and_its_end(self) -> None:
        driver = Driver()
        lease = driver.leased()
        assert reasons(driver.unload()[1]) == ["unload asked for"]
        assert reasons(driver.release(lease)) == ["drained"]

    def test_a_drain_and_its_deadline(self) -> None:
        driver = Driver()
        driver.leased()
        driver.unload()
        assert reasons(driver.after(30)) == ["its drain deadline passed"]

    def test_a_drain_for_another_is_said_to_be_for_it_to_the_end(self) -> None:
        driver = Short(1, Limits(patience=15), busy=model(1), other=model(1))
        lease = driver.leased("busy")
        driver.acquire("other")
        (why,) = reasons(driver.after(15))
        assert why.startswith("put out for other: other needs 1.0 GiB on cpu, 0 B are free; credit ")
        assert reasons(driver.release(lease, "busy")) == [why]

    def test_a_drain_for_another_who_needs_it_no_more(self) -> None:
        driver = Short(1, Limits(patience=15), busy=model(1), other=model(1))
        driver.leased("busy")
        waiting, _ = driver.acquire("other")
        driver.after(15)
        assert reasons(driver.cancel(waiting, "other")) == ["its memory is not needed any more"]
        assert driver.view("busy").parting == ""

    def test_a_change_of_its_configuration(self) -> None:
        driver = Short(1, a=model(1))
        driver.loaded("a")
        assert reasons(driver.reconfigure(restart=("a",), a=model(1))) == ["its configuration has changed"]

    def test_no_place_in_the_configuration(self) -> None:
        driver = Short(1, a=model(1))
        driver.loaded("a")
        assert reasons(driver.reconfigure()) == ["it is not configured any more"]

    def test_the_shutdown(self) -> None:
        driver = Short(1, a=model(1), b=model(0))
        driver.loaded("a")
        driver.acquire("b")
        driver.gone(broken(), "b")
        driver.acquire("b")
        assert reasons(driver.tell(ev.Shutdown())) == ["shutting down", "shutting down"]
        assert (driver.state("a"), driver.state("b")) == ("stopping", "failed")

    def test_a_failure(self) -> None:
        driver = Driver()
        driver.acquire()
        assert reasons(driver.failing(broken("no such library"))) == ["no such library"]
        assert reasons(driver.gone(broken("no such library"))) == ["no such library"]

    def test_what_could_never_fit(self) -> None:
        driver = Short(1, a=model(2))
        (why,) = reasons(driver.acquire("a")[1])
        assert why == "model requires 2.0 GiB but only 1.0 GiB are available (after 0 B overhead)"

    def test_a_process_that_does_not_go(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        found = driver.tell(ev.Stuck("m", 1, [4711, 4712]))
        assert reasons(found) == ["SIGKILL was sent to 4711, 4712, and it is still there"]

    def test_all_that_it_lacks_is_named(self) -> None:
        driver = Short(1, Limits(max_loaded=1), a=model(1), b=model(1))
        driver.loaded("a")
        (why,) = reasons(driver.load("b")[1])
        lacking = "b needs 1.0 GiB on cpu, 0 B are free and 1 of 1 places are taken (max_loaded)"
        assert why == f"put out for b: {lacking}; " + driver.scheduler._sums("a")


class TestNotices:
    def test_a_preload_that_does_not_fit(self) -> None:
        driver = Short(1, a=model(1, preload=True, priority="high"), b=model(1, preload=True))
        found = only(driver.tell(ev.Start()), fx.Noticed)
        assert found == [fx.Noticed("b", "stopped", 0, "not loaded: b needs 1.0 GiB on cpu, 0 B are free")]

    def test_growth_on_several_devices(self) -> None:
        devices = tuple(Device(name=name, total=1 * GIB) for name in ("x", "y", "z"))
        driver = Short(devices=devices, a=model(3, devices=("x", "y", "z"), spread=3))
        driver.loaded("a")
        used = {"x": 2 * GIB, "y": 3 * GIB, "z": GIB}
        (notice, *_) = only(driver.tell(ev.Sampled({}, {"a": (1, used)})), fx.Noticed)
        words = "uses 2.0 GiB of x where 1.0 GiB were reserved and 3.0 GiB of y where 1.0 GiB were reserved"
        assert notice == fx.Noticed("a", "ready", 1, words)

    def test_pressure_from_other_programs(self) -> None:
        driver = Short(devices=(Device(name="cpu", total=8 * GIB, minimum=GIB),), a=model(1), b=model(1))
        driver.loaded("a")
        driver.leased("b")
        sums = driver.scheduler._sums("a")
        assert reasons(driver.sampled(0.5, a=1, b=1)) == [f"put out because cpu lacks 512.0 MiB; {sums}"]
        driver.gone(model="a")
        driver.after(5)
        words = "cpu lacks 512.0 MiB, and no idle model can be put out: nothing more is loaded there"
        assert driver.sampled(0.5, b=1) == [fx.Noticed("", "ready", 0, words)]

    def test_a_device_that_runs_low_again_is_spoken_of_again(self) -> None:
        driver = Short(devices=(Device(name="cpu", total=8 * GIB, minimum=GIB),), b=model(1))
        driver.leased("b")
        assert len(only(driver.sampled(0.5, b=1), fx.Noticed)) == 1
        assert driver.sampled(0.5, b=1) == []
        assert driver.sampled(5, b=1) == []
        assert len(only(driver.sampled(0.5, b=1), fx.Noticed)) == 1

    def test_more_models_than_may_be_loaded(self) -> None:
        driver = Short(9, a=model(1), b=model(1), c=model(1))
        driver.leased("a")
        driver.leased("b")
        driver.loaded("c")
        policies = {name: model(1) for name in "abc"}
        devices = (Device(name="cpu", total=9 * GIB),)
        driver.tell(ev.Reconfigure(policies=policies, queue=9, limits=Limits(max_loaded=1), devices=devices))
        sums = driver.scheduler._sums("c")
        found = driver.tell(ev.Sampled({}, {}))
        assert reasons(found) == [f"put out because 3 are loaded and max_loaded is 1; {sums}"]
        (notice,) = only(found, fx.Noticed)
        assert notice.reason == (
            "2 are loaded and max_loaded is 1, and no idle model can be put out: nothing more is loaded"
        )


class TestErrors:
    def test_no_such_model(self) -> None:
        (error,) = errors(Driver().tell(ev.Acquire(1, "nobody")))
        assert error.message == "no model is named 'nobody'"

    def test_a_full_queue(self) -> None:
        driver = Driver(queue=2, a=policy(), b=policy(queue=1))
        driver.acquire("b")
        (error,) = errors(driver.acquire("b")[1])
        assert error.message == "1 requests wait already, as many as may for b"
        driver.acquire("a")
        (error,) = errors(driver.acquire("a")[1])
        assert error.message == "2 requests wait already, as many as may for all models together"

    def test_an_unload(self) -> None:
        driver = Driver()
        driver.acquire()
        (error,) = errors(driver.unload()[1])
        assert (error.code, error.message, error.details) == ("unloaded", "m was unloaded", {"model": "m"})

    def test_an_unload_of_one_that_is_pinned(self) -> None:
        driver = Short(1, a=model(1, pinned=True))
        driver.loaded("a")
        (error,) = errors(driver.unload("a")[1])
        assert (error.message, error.details) == ("a is pinned; unload it by force", {"model": "a"})

    def test_the_shutdown(self) -> None:
        driver = Driver()
        driver.acquire()
        (waited,) = errors(driver.tell(ev.Shutdown()))
        (late,) = errors(driver.acquire()[1])
        assert waited.message == late.message == "mlxsup is shutting down"

    def test_a_model_that_is_removed(self) -> None:
        driver = Short(1, a=model(1))
        driver.leased("a")
        driver.acquire("a")
        (waited,) = errors(driver.reconfigure())
        (late,) = errors(driver.acquire("a")[1])
        assert waited.message == late.message == "a is not configured any more"
        assert waited.details == late.details == {"model": "a"}
        assert waited.code == late.code == "model_not_found"

    def test_a_process_that_does_not_go(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        driver.acquire()
        (error,) = errors(driver.tell(ev.Stuck("m", 1, [4711, 4712])))
        reason = "SIGKILL was sent to 4711, 4712, and it is still there"
        assert error.message == f"m cannot be started again yet: {reason}"
        assert error.details == {"model": "m", "pids": [4711, 4712], "reason": reason}
        assert error.retry_after == 5

    def test_a_model_that_fails_again_and_again(self) -> None:
        driver = Short(1, Limits(backoff=Backoff(first=1.16, failures=2)), a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        driver.after(2)
        driver.acquire("a")
        driver.gone(broken(), "a")
        (error,) = errors(driver.acquire("a")[1])
        assert error.message == "a failed 2 times in a row and is not started again yet: no such file"
        assert error.details == {"last_words": ["bye"], "model": "a", "cause_code": "load_failed", "failures": 2}
        assert error.retry_after == 2.3
        driver.after(2.3)
        (error,) = errors(driver.acquire("a")[1])
        assert error.retry_after == 0.1, "never at once"

    def test_what_does_not_fit_for_now_names_the_model_and_what_is_pinned(self) -> None:
        driver = Short(2, a=model(1, pinned=True), b=model(2))
        driver.loaded("a")
        (error,) = errors(driver.acquire("b")[1])
        assert error.message.endswith("(after 0 B overhead); 1.0 GiB are held by pinned models")
        assert error.details["model"] == "b"
        assert error.retry_after == 15

    @pytest.mark.parametrize("others", [GIB, 2 * GIB])
    def test_what_other_programs_hold_is_waited_for_a_while(self, others: int) -> None:
        driver = Short(2, b=model(2))
        driver.tell(ev.Sampled({"cpu": 2 * GIB - others}, {}))
        words = driver.explained("b")
        _, found = driver.acquire("b")
        assert errors(found) == []
        assert errors(driver.after(14.9)) == []
        (error,) = errors(driver.after(0.1))
        assert error.message.endswith("(after 0 B overhead); other programs hold what is missing")
        assert "permanent" not in error.details
        assert error.retry_after == 15
        assert words == f"queued for a moment, then refused: {error.message}"

    def test_what_other_programs_give_back_in_time_is_taken(self) -> None:
        driver = Short(2, b=model(2))
        driver.sampled(1)
        driver.acquire("b")
        driver.after(10)
        assert [type(effect) for effect in driver.sampled(2)] == [fx.Changed, fx.Spawn]
        driver.ready("b")
        assert driver.after(10) == []

    def test_who_leaves_meanwhile_is_not_waited_for(self) -> None:
        driver = Short(2, b=model(2))
        driver.sampled(1)
        ticket, _ = driver.acquire("b")
        driver.cancel(ticket, "b")
        assert driver.scheduler.wake_at() is None

    def test_where_the_figure_comes_from(self) -> None:
        driver = Short(2, a=model(memory=None), p=model(1, pinned=True))
        driver.acquire("a")
        (error,) = errors(driver.tell(ev.Weighed("a", 1, 3 * GIB, source="estimated")))
        assert error.message.endswith("(after 0 B overhead); its need is estimated")
        assert error.details["permanent"]
        driver.loaded("p")
        driver.load("a")
        (error,) = errors(driver.tell(ev.Weighed("a", 2, 2 * GIB, source="measured")))
        assert error.message.endswith("1.0 GiB are held by pinned models; its need is measured")
