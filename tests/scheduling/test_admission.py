"""Where a model is placed, whom that costs, and who is told that it cannot be."""

from __future__ import annotations

import pytest

from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.eviction import choose
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits

from .driving import GIB, UNLIMITED, Short, changes, model, only, rejected, spawned, stopped


def cards(*gib: float) -> tuple[Device, ...]:
    """Devices `0`, `1`, ... of so many GiB."""
    return tuple(Device(name=str(number), total=int(size * GIB)) for number, size in enumerate(gib))


def placed(found: list[fx.Effect]) -> dict[str, float]:
    """GiB by device that the one runner that was started may use."""
    (spawn,) = only(found, fx.Spawn)
    return {device: size / GIB for device, size in spawn.shares.items()}


class TestPlace:
    def test_where_there_is_most_room(self) -> None:
        every = ("0", "1", "2")
        driver = Short(devices=cards(4, 5, 4), a=model(2, devices=every), b=model(2, devices=every))
        assert placed(driver.acquire("a")[1]) == {"1": 2}
        assert placed(driver.acquire("b")[1]) == {"0": 2}

    def test_on_one_rather_than_on_two_with_more_room(self) -> None:
        every = ("0", "1", "2")
        driver = Short(devices=cards(2, 9, 9), a=model(2, devices=every, spread=2), b=model(9, devices=("1",)))
        driver.loaded("b")
        assert placed(driver.acquire("a")[1]) == {"2": 2}

    def test_of_several_cards_the_one_with_least_room_counts(self) -> None:
        driver = Short(devices=cards(3, 4, 5), a=model(6, devices=("0", "1", "2"), spread=2))
        assert placed(driver.acquire("a")[1]) == {"1": 3, "2": 3}

    def test_parts_are_rounded_up(self) -> None:
        driver = Short(devices=cards(1, 1), a=model(memory=GIB + 1, devices=("0", "1"), spread=2))
        (spawn,) = only(driver.acquire("a")[1], fx.Spawn)
        assert spawn.shares == {"0": GIB // 2 + 1, "1": GIB // 2 + 1}

    def test_on_no_more_cards_than_it_may(self) -> None:
        driver = Short(devices=cards(1, 1, 1), a=model(3, devices=("0", "1", "2"), spread=2))
        assert rejected(driver.acquire("a")[1]) == {1: "does_not_fit"}

    def test_on_as_many_as_there_are(self) -> None:
        driver = Short(devices=cards(1, 1), a=model(2, devices=("0", "1", "gone"), spread=3))
        assert placed(driver.acquire("a")[1]) == {"0": 1, "1": 1}

    def test_anywhere_where_its_memory_is_not_counted(self) -> None:
        driver = Short(devices=cards(1), a=model(9, devices=()), b=model(9, devices=("gone",)))
        assert placed(driver.acquire("a")[1]) == {}
        assert placed(driver.acquire("b")[1]) == {}

    def test_what_fits_exactly_fits(self) -> None:
        driver = Short(devices=cards(2), a=model(1, devices=("0",)), b=model(1, devices=("0",)))
        assert placed(driver.acquire("a")[1]) == {"0": 1}
        assert placed(driver.acquire("b")[1]) == {"0": 1}

    def test_places_are_no_device(self) -> None:
        driver = Short(3, Limits(max_loaded=1), a=model(1))
        assert placed(driver.acquire("a")[1]) == {"cpu": 1}
        assert driver.view("a").reserved == {"cpu": GIB}

    def test_a_model_whose_memory_is_not_counted_takes_a_place_all_the_same(self) -> None:
        driver = Short(3, Limits(max_loaded=1), a=model(9, devices=()), b=model(1))
        driver.leased("a")
        assert spawned(driver.acquire("b")[1]) == []

    def test_who_needs_nothing_fits_on_an_overdrawn_device(self) -> None:
        driver = Short(1, a=model(1), b=model(0))
        driver.leased("a")
        driver.sampled(1, a=2)
        assert spawned(driver.acquire("b")[1]) == ["b"]


class TestWhoGoes:
    def test_nobody_where_those_who_go_leave_enough(self) -> None:
        driver = Short(2, a=model(1), b=model(1), c=model(1))
        driver.loaded("a")
        driver.loaded("b")
        driver.unload("a")
        assert stopped(driver.acquire("c")[1]) == []
        assert spawned(driver.gone(model="a")) == ["c"]

    def test_it_is_waited_where_there_will_be_most_room(self) -> None:
        """What is held for one that waits on the first card is not to be had for the next."""
        devices = cards(2, 3)
        driver = Short(
            devices=devices,
            a=model(2, devices=("0",)),
            b=model(3, devices=("1",)),
            c=model(1, devices=("0", "1")),
            d=model(2, devices=("0",)),
        )
        for name in "ab":
            driver.loaded(name)
            driver.unload(name)
        driver.acquire("c")
        driver.acquire("d")
        assert spawned(driver.gone(model="a")) == ["c"]

    def test_the_cheapest_to_load_again_on_whichever_card(self) -> None:
        driver = Short(
            devices=cards(1, 1), a=model(1, devices=("0",)), b=model(1, devices=("1",)), c=model(1, devices=("0", "1"))
        )
        for name, seconds in (("a", 20), ("b", 10)):
            driver.load(name)
            driver.after(seconds)
            driver.ready(name)
        assert stopped(driver.acquire("c")[1]) == ["b"]
        assert placed(driver.gone(model="b")) == {"1": 1}

    def test_of_ways_that_cost_the_same_the_one_on_fewer_cards(self) -> None:
        driver = Short(
            devices=cards(2, 2),
            idle=model(2, devices=("0",)),
            busy=model(1, devices=("1",)),
            new=model(2, devices=("0", "1"), spread=2),
        )
        driver.loaded("idle")
        driver.leased("busy")
        assert stopped(driver.acquire("new")[1]) == ["idle"]
        assert placed(driver.gone(model="idle")) == {"0": 2}

    def test_what_is_held_for_who_came_first_is_lacking(self) -> None:
        """Two wait: one goes for the first, and another for the second."""
        driver = Short(2, a=model(1), b=model(1), c=model(1), d=model(1))
        driver.loaded("a")
        driver.loaded("b")
        assert stopped(driver.acquire("c")[1]) == ["a"]
        assert stopped(driver.acquire("d")[1]) == ["b"]
        assert spawned(driver.gone(model="b")) == ["c"]
        assert spawned(driver.gone(model="a")) == ["d"]

    def test_a_pinned_one_is_not_drained_for_who_has_waited_long(self) -> None:
        driver = Short(2, a=model(1, pinned=True), b=model(1), c=model(1))
        driver.leased("a")
        driver.leased("b")
        driver.acquire("c")
        assert changes(driver.after(15)) == [("ready", "draining")]
        assert driver.state("b") == "draining"

    def test_busy_ones_are_drained_only_for_who_lacks_patience(self) -> None:
        driver = Short(1, Limits(patience=15), a=model(1), b=model(1))
        driver.leased("a")
        driver.acquire("b")
        assert driver.after(14.9) == []
        assert changes(driver.after(0.1)) == [("ready", "draining")]

    def test_idle_ones_go_together_with_busy_ones_where_neither_are_enough(self) -> None:
        driver = Short(2, idle=model(1), busy=model(1), large=model(2))
        driver.leased("busy")
        driver.loaded("idle")
        driver.acquire("large")
        assert driver.state("idle") == "ready"
        assert stopped(driver.after(15)) == ["idle"]
        assert driver.state("busy") == "draining"

    def test_one_that_loads_still_is_not_drained(self) -> None:
        driver = Short(2, a=model(1), b=model(1), c=model(1))
        driver.leased("b")
        driver.acquire("a")
        driver.acquire("c")
        driver.after(15)
        assert (driver.state("a"), driver.state("b")) == ("starting", "draining")


class TestChoice:
    @pytest.mark.parametrize(
        ("lacking", "candidates", "chosen"),
        [
            ({"x": 1}, [("a", {"x": 1}), ("b", {"x": 1})], ["a"]),
            ({"x": 2, "y": 1}, [("a", {"x": 2}), ("b", {"y": 1})], ["a", "b"]),
            ({"x": 2, "y": 1}, [("a", {"y": 1}), ("b", {"x": 2}), ("c", {"x": 1, "y": 1})], ["a", "b"]),
            ({"x": 2}, [("a", {"y": 5}), ("b", {"x": 2})], ["b"]),
            ({"x": 2, "y": 0}, [("a", {"y": 5}), ("b", {"x": 2})], ["b"]),
            ({"x": 2, "y": 0}, [("a", {"x": 2}), ("b", {"y": 2})], ["a"]),
            ({"x": 3}, [("a", {"x": 1}), ("b", {"x": 3})], ["b"]),
            ({"x": 3, "y": 1}, [("a", {"x": 1, "y": 1}), ("b", {"x": 3})], ["a", "b"]),
            ({"x": 4}, [("a", {"x": 1}), ("b", {"x": 1}), ("c", {"x": 3})], ["a", "c"]),
            ({"x": 4}, [("a", {"x": 1}), ("b", {"x": 2}), ("c", {"x": 2})], ["b", "c"]),
            ({"x": 5, "y": 1}, [("a", {"y": 1}), ("b", {"x": 2, "y": 1}), ("c", {"x": 3})], ["b", "c"]),
            ({"x": 2, "y": 2}, [("a", {"x": 1}), ("b", {"y": 1}), ("c", {"x": 2, "y": 2})], ["c"]),
            ({"x": 0}, [("a", {"x": 1})], []),
            ({"x": -1}, [("a", {"x": 1})], []),
            ({}, [("a", {"x": 1})], []),
            ({"x": 3}, [("a", {"x": 1}), ("b", {"x": 1})], None),
            ({"x": 1, "y": 1}, [("a", {"x": 1})], None),
        ],
    )
    def test_who_goes(
        self, lacking: dict[str, int], candidates: list[tuple[str, dict[str, int]]], chosen: list[str] | None
    ) -> None:
        assert choose(lacking, candidates) == chosen

    def test_nobody_more_is_looked_at_than_is_needed(self) -> None:
        looked = iter([("a", {"x": 1}), ("b", {"x": 1}), ("c", {"x": 1}), ("d", {"x": 1})])
        assert choose({"x": 1}, looked) == ["a"]
        assert [name for name, _ in looked] == ["c", "d"]


class TestResidency:
    LIMITS = Limits(min_residency=10, patience=15)

    def test_the_first_that_is_old_enough_goes(self) -> None:
        driver = Short(2, self.LIMITS, a=model(1), b=model(1), c=model(1))
        driver.loaded("b")
        driver.after(4)
        driver.loaded("a")
        assert stopped(driver.acquire("c")[1]) == []
        assert driver.scheduler.wake_at() == driver.now + 6
        assert stopped(driver.after(5.9)) == []
        assert stopped(driver.after(0.1)) == ["b"]

    def test_an_old_one_goes_at_once(self) -> None:
        driver = Short(2, self.LIMITS, a=model(1), b=model(1), c=model(1))
        driver.loaded("b")
        driver.after(4)
        driver.loaded("a")
        driver.after(6)
        assert stopped(driver.acquire("c")[1]) == ["b"]

    def test_where_several_wait_each_is_looked_at_in_time(self) -> None:
        driver = Short(
            devices=cards(1, 1),
            limits=self.LIMITS,
            a=model(1, devices=("0",)),
            b=model(1, devices=("1",)),
            c=model(1, devices=("0",)),
            d=model(1, devices=("1",)),
        )
        driver.loaded("b")
        driver.after(3)
        driver.loaded("a")
        driver.acquire("c")
        driver.acquire("d")
        assert driver.scheduler.wake_at() == driver.now + 7
        assert stopped(driver.after(7)) == ["b"]
        assert stopped(driver.after(3)) == ["a"]

    def test_nobody_wakes_for_a_pinned_one(self) -> None:
        driver = Short(2, self.LIMITS, a=model(1, pinned=True), b=model(1), c=model(1))
        driver.leased("b")
        driver.after(8)
        driver.loaded("a")
        driver.acquire("c")
        driver.after(7)
        assert stopped(driver.after(2)) == []
        assert driver.scheduler.wake_at() == 1000.0 + 8 + 15

    def test_nobody_wakes_any_more_when_the_last_has_left(self) -> None:
        driver = Short(1, self.LIMITS, a=model(1, keep_alive=-1.0), b=model(1))
        driver.loaded("a")
        ticket, _ = driver.acquire("b")
        driver.cancel(ticket, "b")
        driver.sampled(1)
        assert driver.after(60) == []

    def test_the_young_are_not_drained_together_with_idle_ones_that_are_old(self) -> None:
        driver = Short(2, self.LIMITS, idle=model(1), busy=model(1), large=model(2))
        driver.leased("busy")
        driver.acquire("large")
        driver.after(14)
        driver.loaded("idle")
        assert stopped(driver.after(1)) == []
        assert driver.state("busy") == "ready"
        assert stopped(driver.after(9)) == ["idle"]

    def test_a_device_that_is_overdrawn_waits_for_no_residency(self) -> None:
        driver = Short(8, self.LIMITS, a=model(1))
        driver.loaded("a")
        driver.sampled(0, a=9)
        assert driver.state("a") == "stopping"


class TestPressure:
    def driver(self) -> Short:
        driver = Short(
            devices=cards(4, 4), a=model(1, devices=("0",)), b=model(1, devices=("1",)), c=model(1, devices=("1",))
        )
        for name in "abc":
            driver.loaded(name)
        return driver

    def test_as_many_go_as_it_takes(self) -> None:
        used = {"b": (1, {"1": GIB}), "c": (1, {"1": 4 * GIB})}
        found = self.driver().tell(ev.Sampled({"0": 4 * GIB, "1": 4 * GIB}, used))
        assert stopped(found) == ["b"]

    def test_all_that_hold_something_there_where_they_are_not_enough(self) -> None:
        driver = self.driver()
        lease, _ = driver.acquire("c")
        found = driver.tell(ev.Sampled({}, {"b": (1, {"1": GIB}), "c": (1, {"1": 7 * GIB})}))
        assert stopped(found) == ["b"]
        driver.release(lease, "c")
        assert stopped(driver.tell(ev.Sampled({}, {}))) == ["c"]
        assert driver.state("a") == "ready"

    def test_nobody_where_there_is_enough(self) -> None:
        driver = Short(devices=cards(4), a=model(1, devices=("0",)))
        driver.loaded("a")
        assert driver.tell(ev.Sampled({"0": 0}, {"a": (1, {"0": GIB})})) == []

    def test_each_device_is_looked_at(self) -> None:
        driver = Short(devices=cards(4, 4), a=model(1, devices=("1",)))
        driver.loaded("a")
        assert stopped(driver.tell(ev.Sampled({}, {"a": (1, {"1": 5 * GIB})}))) == ["a"]

    def test_looks_at_others_go_on_where_one_process_is_an_earlier_one(self) -> None:
        driver = Short(devices=cards(4), a=model(1, devices=("0",)), b=model(1, devices=("0",)))
        driver.loaded("a")
        driver.loaded("b")
        used = {"nobody": (1, {"0": GIB}), "a": (7, {"0": 3 * GIB}), "b": (1, {"0": 2 * GIB})}
        driver.tell(ev.Sampled({}, used))
        assert driver.view("a").reserved == {"0": GIB}
        assert driver.view("b").reserved == {"0": 2 * GIB}


class TestRefusals:
    def test_the_way_that_comes_nearest_is_named(self) -> None:
        driver = Short(devices=cards(1, 3, 2), a=model(4, devices=("0", "1", "2")))
        (reject,) = only(driver.acquire("a")[1], fx.Reject)
        details = {"device": "1", "required": 4 * GIB, "available": 3 * GIB, "overhead": 0}
        assert reject.error.details == {**details, "permanent": True, "model": "a"}

    def test_of_cards_alike_the_first(self) -> None:
        driver = Short(devices=cards(1, 1, 1), a=model(8, devices=("0", "1", "2"), spread=2))
        (reject,) = only(driver.acquire("a")[1], fx.Reject)
        assert reject.error.details["device"] == "0"
        assert reject.error.details["required"] == 4 * GIB

    def test_a_passing_shortage_is_told_of_the_card_on_which_it_can_be(self) -> None:
        driver = Short(devices=cards(24, 8), a=model(12, devices=("0", "1")))
        driver.tell(ev.Sampled({"0": 4 * GIB, "1": 8 * GIB}, {}))
        assert rejected(driver.acquire("a")[1]) == {}
        (reject,) = only(driver.after(15), fx.Reject)
        details = {"device": "0", "required": 12 * GIB, "available": 4 * GIB, "overhead": 0}
        assert reject.error.details == {**details, "model": "a"}
        assert reject.error.retry_after == 15
        assert reject.error.message.endswith("other programs hold what is missing")

    def test_of_the_cards_of_a_way_the_one_that_is_too_small_is_told(self) -> None:
        driver = Short(devices=cards(8, 3), a=model(8, devices=("1", "0"), spread=2), p=model(1, devices=("0",)))
        driver.scheduler._books["p"].policy = model(1, devices=("0",), pinned=True)
        driver.loaded("p")
        driver.tell(ev.Sampled({"0": GIB, "1": 3 * GIB}, {}))
        (reject,) = only(driver.acquire("a")[1], fx.Reject)
        assert (reject.error.details["device"], reject.error.details["required"]) == ("0", 8 * GIB)
        assert reject.error.retry_after == 15
        assert "1.0 GiB are held by pinned models" in reject.error.message

    def test_pinned_ones_on_the_larger_card_are_no_reason_for_ever(self) -> None:
        driver = Short(devices=cards(24, 8), p=model(20, pinned=True, devices=("0",)), a=model(12, devices=("0", "1")))
        driver.loaded("p")
        (reject,) = only(driver.acquire("a")[1], fx.Reject)
        assert reject.error.details["available"] == 4 * GIB
        assert "permanent" not in reject.error.details
        assert reject.error.retry_after == 15

    def test_who_shall_come_back_waits_for_other_programs_on_the_larger_card(self) -> None:
        devices = tuple(Device(name=name, total=gib * GIB, overhead=GIB) for name, gib in (("0", 24), ("1", 8)))
        driver = Short(devices=devices, a=model(12, devices=("0", "1"), comes_back=True))
        driver.tell(ev.Sampled({"0": 24 * GIB, "1": 8 * GIB}, {}))
        driver.loaded("a")
        driver.tell(ev.Sampled({"0": 0, "1": 8 * GIB}, {"a": (1, {"0": 12 * GIB})}))
        assert driver.state("a") == "stopping"
        driver.gone(model="a")
        driver.after(60)
        driver.tell(ev.Sampled({"0": 2 * GIB, "1": 8 * GIB}, {}))
        driver.after(300)
        assert spawned(driver.tell(ev.Sampled({"0": 24 * GIB, "1": 8 * GIB}, {}))) == ["a"]

    def test_what_pinned_ones_keep_is_no_reason_for_ever(self) -> None:
        driver = Short(devices=cards(2), a=model(1, pinned=True, devices=("0",)), b=model(2, devices=("0",)))
        driver.loaded("a")
        (reject,) = only(driver.acquire("b")[1], fx.Reject)
        assert "permanent" not in reject.error.details
        assert reject.error.details["available"] == GIB
        driver.unload("a", force=True)
        driver.gone(model="a")
        assert spawned(driver.acquire("b")[1]) == ["b"]

    @pytest.mark.parametrize("minimum", [0, 1])
    def test_a_device_must_hold_it_beside_what_is_kept_back(self, minimum: int) -> None:
        device = Device(name="0", total=2 * GIB, minimum=minimum, overhead=GIB)
        driver = Short(devices=(device,), a=model(1, devices=("0",)))
        assert bool(spawned(driver.acquire("a")[1])) == (minimum == 0)
        assert (driver.view("a").error is not None) == (minimum == 1)

    def test_too_many_pinned_models(self) -> None:
        driver = Short(9, Limits(max_loaded=1), a=model(1, pinned=True), b=model(1))
        driver.loaded("a")
        (reject,) = only(driver.acquire("b")[1], fx.Reject)
        assert reject.error.message == "max_loaded is 1, and all that are loaded are pinned"
        assert reject.error.details == {"max_loaded": 1, "model": "b"}


def test_what_no_machine_has_is_refused_like_anything_that_is_too_large() -> None:
    driver = Short(4, UNLIMITED, (), m=model(1 << 40))
    assert "but only 4.0 GiB are available" in driver.explained("m")
    _, found = driver.acquire("m")
    (refusal,) = only(found, fx.Reject)
    assert (refusal.error.code, refusal.error.details["permanent"]) == ("does_not_fit", True)
