"""What the order of idle models is told by the scheduler, and how the scheduler goes by it."""

from __future__ import annotations

from mlxsup.scheduling import events as ev
from mlxsup.scheduling.eviction import Order, Worth
from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy, Scheduler

from .driving import GIB, Short, model, spawned, stopped


class Ranks(Order):
    """An order by ranks that a test gives; it writes down all it is told."""

    def __init__(self, **ranks: float) -> None:
        self.ranks = ranks
        self.uses: list[tuple[str, Worth, float]] = []
        self.asked: list[tuple[str, Worth, float]] = []
        self.levels: list[float] = []
        self.forgotten: list[str] = []
        self.capacities: list[int] = []
        self.moment = 0

    def epoch(self, now: float) -> int:
        return self.moment

    def key(self, model: str, worth: Worth, now: float) -> float:
        self.asked.append((model, worth, now))
        return self.ranks[model]

    def explain(self, model: str, worth: Worth) -> str:
        return f"{model} is worth {self.ranks[model]:g} at {worth.size / GIB:g} GiB"

    def used(self, model: str, worth: Worth, now: float) -> None:
        self.uses.append((model, worth, now))

    def evicted(self, key: float) -> None:
        self.levels.append(key)

    def forget(self, model: str) -> None:
        self.forgotten.append(model)

    def resize(self, capacity: int) -> None:
        self.capacities.append(capacity)


def ranked(order: Ranks, gib: int = 2, limits: Limits | None = None, **policies: Policy) -> Short:
    driver = Short(gib)
    devices = [Device(name="cpu", total=gib * GIB)]
    driver.scheduler = Scheduler(policies, 100, limits or Limits(), devices, order)
    return driver


class TestWhatItIsTold:
    def test_each_use_with_what_the_model_holds_and_what_its_load_took(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(1, priority="high", keep_alive=7.0))
        first, _ = driver.acquire("a")
        driver.after(3)
        driver.ready("a")
        worth = Worth(seconds=3, size=GIB, weight=4.0, keep_alive=7.0)
        assert order.uses == [("a", worth, driver.now)]
        driver.after(2)
        driver.release(first, "a")
        assert order.asked == [("a", worth, driver.now)]
        driver.after(1)
        driver.acquire("a")
        assert order.uses[1:] == [("a", worth, driver.now)]

    def test_what_is_left_of_its_keep_alive(self) -> None:
        order = Ranks(a=1, b=2)
        driver = ranked(order, 1, a=model(1, keep_alive=60.0), b=model(1))
        driver.loaded("a")
        driver.after(50)
        order.moment = 1
        driver.acquire("b")
        assert [worth.keep_alive for _, worth, _ in order.asked] == [60, 10]

    def test_a_model_that_has_grown_holds_more(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(1))
        lease = driver.leased("a")
        driver.sampled(9, a=1.5)
        driver.release(lease, "a")
        assert order.asked[-1][1].size == 1.5 * GIB

    def test_a_place_is_no_memory(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, limits=Limits(max_loaded=1), a=model(1))
        driver.loaded("a")
        assert order.asked[-1][1].size == GIB

    def test_the_worth_of_a_load_that_was_never_seen_is_guessed_by_its_size(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(2, priority="low"))
        driver.loaded("a")
        assert order.asked[-1][1] == Worth(seconds=3.0, size=2 * GIB, weight=0.25, keep_alive=600.0)

    def test_the_time_of_loads_is_learnt_and_the_latest_counts_three_tenths(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(1))
        for seconds in (10, 20):
            driver.load("a")
            driver.after(seconds)
            driver.ready("a")
            driver.unload("a")
            driver.gone(model="a")
        assert [worth.seconds for _, worth, _ in order.asked] == [10, 13]

    def test_what_loads_took_in_an_earlier_life_counts_as_seen(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(memory=None))
        driver.load("a")
        driver.tell(ev.Weighed("a", 1, GIB, 40.0))
        driver.after(10)
        driver.ready("a")
        driver.unload("a")
        driver.gone(model="a")
        driver.load("a")
        driver.tell(ev.Weighed("a", 2, GIB, 99.0))
        driver.after(31)
        driver.ready("a")
        assert [worth.seconds for _, worth, _ in order.asked] == [31, 31]

    def test_up_to_which_key_models_went(self) -> None:
        order = Ranks(a=1, b=2, c=3)
        driver = ranked(order, a=model(1), b=model(1), c=model(2))
        driver.loaded("b")
        driver.loaded("a")
        driver.acquire("c")
        assert order.levels == [2]

    def test_busy_ones_that_are_drained_have_no_key(self) -> None:
        order = Ranks(a=1, b=2)
        driver = ranked(order, 1, a=model(1), b=model(1))
        driver.leased("a")
        driver.acquire("b")
        driver.after(15)
        assert driver.state("a") == "draining"
        assert order.levels == []

    def test_a_model_that_is_no_more_is_forgotten(self) -> None:
        order = Ranks(a=1)
        driver = ranked(order, a=model(1), b=model(1))
        driver.tell(ev.Reconfigure(policies={"a": model(1)}, queue=9, limits=Limits()))
        assert order.forgotten == ["b"]

    def test_how_much_memory_there_is(self) -> None:
        order = Ranks()
        driver = ranked(order)
        devices = (Device(name="cpu", total=GIB), Device(name="gpu", total=4 * GIB, minimum=GIB))
        driver.tell(ev.Reconfigure(policies={}, queue=9, limits=Limits(max_loaded=7), devices=devices))
        assert order.capacities == [2 * GIB, 4 * GIB]


class TestWhatItSays:
    def test_the_lowest_key_goes_first(self) -> None:
        driver = ranked(Ranks(a=2, b=1, c=3), a=model(1), b=model(1), c=model(1))
        driver.loaded("a")
        driver.loaded("b")
        assert driver.scheduler.idle == ["b", "a"]
        assert stopped(driver.acquire("c")[1]) == ["b"]
        assert "; b is worth 1 at 1 GiB" in driver.view("b").reason

    def test_another_epoch_is_another_order(self) -> None:
        order = Ranks(a=2, b=1, c=3)
        driver = ranked(order, a=model(1), b=model(1), c=model(1))
        driver.loaded("a")
        driver.loaded("b")
        order.ranks |= {"b": 5}
        order.moment = 1
        asked = len(order.asked)
        assert stopped(driver.acquire("c")[1]) == ["a"]
        assert sorted(name for name, _, _ in order.asked[asked:]) == ["a", "b"]

    def test_another_epoch_is_another_order_for_who_goes_for_nobody_too(self) -> None:
        order = Ranks(a=2, b=1)
        driver = ranked(order, a=model(1), b=model(1))
        driver.loaded("a")
        driver.loaded("b")
        order.ranks |= {"b": 5}
        order.moment = 1
        assert stopped(driver.tell(ev.Sampled({}, {"a": (1, {"cpu": GIB}), "b": (1, {"cpu": GIB + 1})}))) == ["a"]

    def test_within_an_epoch_nobody_is_asked_again(self) -> None:
        order = Ranks(a=2, b=1, c=3)
        driver = ranked(order, a=model(1), b=model(1), c=model(1))
        order.moment = 1
        driver.loaded("a")
        driver.loaded("b")
        asked = len(order.asked)
        driver.acquire("c")
        assert len(order.asked) == asked

    def test_of_busy_ones_the_least_worthy_is_drained(self) -> None:
        order = Ranks(a=2, b=1, c=9)
        driver = ranked(order, a=model(1), b=model(1), c=model(1))
        driver.leased("a")
        driver.leased("b")
        driver.acquire("c")
        driver.after(15)
        assert (driver.state("a"), driver.state("b")) == ("ready", "draining")
        drained = [(name, worth.size, now) for name, worth, now in order.asked]
        assert drained == [("a", GIB, driver.now), ("b", GIB, driver.now)]

    def test_an_idle_one_goes_before_a_busy_one_however_worthy(self) -> None:
        driver = ranked(Ranks(busy=1, idle=9, c=5), 3, busy=model(1), idle=model(1), c=model(2))
        driver.leased("busy")
        driver.loaded("idle")
        found = driver.acquire("c")[1]
        assert stopped(found) == ["idle"]
        assert spawned(driver.gone(model="idle")) == ["c"]
        assert driver.state("busy") == "ready"
