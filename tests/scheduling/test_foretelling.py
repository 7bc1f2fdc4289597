"""The words of `explain`: what would become of a request."""

from __future__ import annotations

from mlxsup.errors import LoadFailed
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.backoff import Backoff
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Scheduler

from .driving import GIB, Driver, Short, broken, model, policy


class TestWhatWouldBecomeOfARequest:
    def test_a_model_that_is_ready(self) -> None:
        driver = Driver(m=policy(concurrency=2))
        driver.leased()
        assert driver.explained() == "granted at once: it is ready"
        driver.acquire()
        assert driver.explained() == "queued: all 2 of its places are taken, 0 wait before it"
        driver.acquire()
        assert driver.explained() == "queued: all 2 of its places are taken, 1 wait before it"

    def test_a_model_that_is_being_loaded(self) -> None:
        driver = Driver()
        driver.load()
        assert driver.explained() == "queued: it is being loaded"
        driver.acquire()
        assert driver.explained() == "queued: it is being loaded, 1 wait before it"

    def test_a_model_on_its_way_out(self) -> None:
        driver = Driver()
        lease = driver.leased()
        driver.unload()
        assert driver.explained() == "queued, and loaded again: it is on its way out (unload asked for)"
        driver.release(lease)
        assert driver.explained() == "queued, and loaded again: it is on its way out (drained)"

    def test_a_process_that_does_not_go(self) -> None:
        driver = Driver()
        driver.loaded()
        driver.unload()
        driver.stuck()
        refusal = "m cannot be started again yet: SIGKILL was sent to 4711, and it is still there"
        assert driver.explained() == f"refused: {refusal}"

    def test_a_failure_and_its_next_try(self) -> None:
        driver = Short(1, Limits(backoff=Backoff(first=8, failures=2)), a=model(1))
        driver.acquire("a")
        driver.gone(broken(), "a")
        assert driver.explained("a") == "queued: started again in 8.0 s after: no such file"
        driver.acquire("a")
        assert driver.explained("a") == "queued: started again in 8.0 s after: no such file"
        driver.after(8)
        driver.gone(broken(), "a")
        refusal = "a failed 2 times in a row and is not started again yet: no such file"
        assert driver.explained("a") == f"refused: {refusal}"
        driver.after(16)
        assert driver.explained("a") == "loaded at once: a needs 1.0 GiB on cpu, 1.0 GiB are free"

    def test_what_is_beyond_help(self) -> None:
        driver = Short(1, a=model(1))
        driver.acquire("a")
        driver.gone(LoadFailed("no such library", details={"permanent": True}), "a")
        assert driver.explained("a") == "refused: no such library"

    def test_the_shutdown(self) -> None:
        driver = Driver()
        driver.tell(ev.Shutdown())
        assert driver.explained() == "refused: mlxsup is shutting down"

    def test_a_model_that_fits(self) -> None:
        assert Short(3, a=model(1)).explained("a") == "loaded at once: a needs 1.0 GiB on cpu, 3.0 GiB are free"

    def test_a_model_whose_memory_is_not_counted(self) -> None:
        assert Short(3, a=model(1, devices=())).explained("a") == "loaded at once"

    def test_a_model_that_waits_for_those_who_go(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.loaded("a")
        driver.unload("a")
        why = "b needs 1.0 GiB on cpu, 0 B are free"
        assert driver.explained("b") == f"loaded when those who go are gone (a): {why}"
        driver.acquire("a")
        assert driver.explained("b") == f"loaded when those who go are gone (a): {why}; to be loaded again: a"

    def test_a_model_that_waits_for_the_memory_of_the_gone(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.sampled(1)
        driver.loaded("a")
        driver.sampled(0, a=1)
        driver.unload("a")
        driver.gone(model="a")
        words = "loaded when the memory of who went is back: b needs 1.0 GiB on cpu, 0 B are free"
        assert driver.explained("b") == words

    def test_a_model_that_others_go_for(self) -> None:
        driver = Short(2, Limits(min_residency=5), a=model(1), b=model(1), c=model(2))
        driver.loaded("a")
        driver.loaded("b")
        driver.after(5)
        a, b = driver.scheduler._sums("a"), driver.scheduler._sums("b")
        going = f"a ({a}); b ({b}); c needs 2.0 GiB on cpu, 0 B are free"
        assert driver.explained("c") == f"loaded after these are put out: {going}"

    def test_a_model_that_others_go_for_when_they_have_been_there_for_long_enough(self) -> None:
        driver = Short(2, Limits(min_residency=5), a=model(1), b=model(1), c=model(2))
        driver.loaded("a")
        driver.loaded("b")
        driver.after(2)
        words = "queued: in 3.0 s a, b will have been loaded for 5 s and may be put out"
        assert driver.explained("c") == f"{words}; c needs 2.0 GiB on cpu, 0 B are free"

    def test_a_model_that_nobody_can_go_for_now(self) -> None:
        driver = Short(
            4,
            busy=model(1),
            pinned=model(1, pinned=True),
            idle=model(0.5),
            loads=model(1),
            leaves=model(0.5),
            new=model(2),
        )
        driver.leased("busy")
        driver.loaded("pinned")
        driver.loaded("idle")
        driver.load("loads")
        driver.leased("leaves")
        driver.unload("leaves")
        standing = "busy is in use, pinned is pinned, idle is idle, loads is being loaded, leaves ends its work"
        assert driver.explained("new") == (
            f"queued until there is room: new needs 2.0 GiB on cpu, 0 B are free; {standing}"
        )

    def test_a_model_that_waits_for_one_that_is_to_be_loaded_in_another_form(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.loaded("a")
        driver.reconfigure(restart=("a",), a=model(1, preload=True), b=model(1))
        why = "b needs 1.0 GiB on cpu, 0 B are free"
        assert driver.explained("b") == f"loaded when those who go are gone (a): {why}; to be loaded again: a"

    def test_a_need_is_what_it_was_the_last_time_where_it_is_not_weighed_now(self) -> None:
        driver = Short(3, a=model(memory=None), b=model(memory=None))
        driver.load("a")
        driver.tell(ev.Weighed("a", 1, 2 * GIB, source="learnt"))
        driver.gone(broken(), "a")
        driver.after(1)
        assert driver.explained("a") == "loaded at once: a needs 2.0 GiB on cpu, 3.0 GiB are free"
        driver.tell(ev.Sampled({"cpu": GIB}, {}))
        assert driver.explained("a").endswith("other programs hold what is missing; its need is learnt")

    def test_only_who_has_what_is_lacking_stands_in_the_way(self) -> None:
        devices = (Device(name="cpu", total=2 * GIB), Device(name="gpu", total=2 * GIB))
        driver = Short(
            devices=devices,
            here=model(1),
            there=model(1, devices=("gpu",)),
            new=model(2),
        )
        driver.leased("here")
        driver.leased("there")
        words = "queued until there is room: new needs 2.0 GiB on cpu, 1.0 GiB are free; here is in use"
        assert driver.explained("new") == words

    def test_one_stands_in_the_way_that_does_not_go(self) -> None:
        driver = Short(1, a=model(1), b=model(1))
        driver.loaded("a")
        driver.unload("a")
        driver.stuck("a")
        words = "queued until there is room: b needs 1.0 GiB on cpu, 0 B are free; a does not go"
        assert driver.explained("b") == words

    def test_of_many_in_the_way_the_first_are_named(self) -> None:
        names = [f"m{number}" for number in range(9)]
        driver = Driver()
        devices = [Device(name="cpu", total=9 * GIB)]
        driver.scheduler = Scheduler({name: model(1) for name in [*names, "new"]}, 100, devices=devices)
        for name in names:
            driver.leased(name)
        named, more = driver.explained("new").partition("free; ")[2].split(" and ")
        assert int(more.removesuffix(" more")) == 9 - len(named.split(", "))
        assert named.startswith("m0 is in use, m1 is in use, ")

    def test_who_comes_after_others(self) -> None:
        driver = Short(2, a=model(2), b=model(2), c=model(2))
        driver.loaded("a")
        driver.acquire("b")
        words = "queued behind b, to whom memory goes first: c needs 2.0 GiB on cpu, 0 B are free"
        assert driver.explained("c") == words

    def test_a_model_that_could_never_fit(self) -> None:
        driver = Short(1, a=model(2))
        refusal = "model requires 2.0 GiB but only 1.0 GiB are available (after 0 B overhead)"
        assert driver.explained("a") == f"refused: {refusal}"

    def test_a_need_that_was_weighed_just_now(self) -> None:
        driver = Short(3, a=model(memory=None))
        words = "loaded at once: a needs 2.0 GiB on cpu, 3.0 GiB are free"
        weighed = ev.Weighed("a", 0, 2 * GIB, source="measured")
        assert driver.scheduler.explain("a", driver.now, weighed) == words
        assert driver.scheduler._books["a"].need == 0
        unfit = ev.Unfit("a", 0, broken())
        assert driver.scheduler.explain("a", driver.now, unfit) == "refused: no such file"
