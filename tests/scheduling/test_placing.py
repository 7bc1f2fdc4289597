"""Where a model goes is as well chosen as if all combinations of devices were looked at, and with many devices as quickly."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

import hypothesis
from hypothesis import strategies as st

from mlxsup.scheduling import events as ev
from mlxsup.scheduling.book import Book
from mlxsup.scheduling.ledger import SLOTS, Device
from mlxsup.scheduling.placing import Room
from mlxsup.scheduling.scheduler import Limits

from .driving import GIB, Short, model, spawned, stopped


class Exhaustive:
    """Plans by all ways that there are, one by one."""

    def __init__(self, driver: Short) -> None:
        self.scheduler = driver.scheduler
        self.ledger = driver.scheduler.ledger
        self.accounts = driver.scheduler.ledger.accounts
        self.now = driver.now

    def plan(self, book: Book, held: Mapping[str, int], *, impatient: bool) -> tuple[str, dict[str, int], float]:
        """Return the verdict, the shares if they are to be had, and the seconds that it costs to load again who goes."""
        ways = list(self.ways(book))
        soon = [way for way in ways if self.have(way, lambda name: self.accounts[name].soon - held.get(name, 0))]
        fitting = [way for way in soon if self.have(way, lambda name: self.accounts[name].available)]
        if soon:
            return "fits" if fitting else "waits", min(fitting or soon, key=self.tightness), 0.0
        reachable = [way for way in ways if self.have(way, lambda name: self.accounts[name].reach)]
        if not reachable:
            possible = any(self.have(way, lambda name: self.accounts[name].utmost) for way in ways)
            return "short" if possible else "refused", {}, 0.0
        admission = self.scheduler._admission
        found = []
        for way in reachable:
            victims, _ = admission._victims(way, self.now, held, impatient=impatient)
            if victims is not None:
                found.append((self.cost(victims), way))
        cost, way = min(found, key=lambda each: each[0], default=(0.0, reachable[0]))
        return "evicts" if found else "blocked", way, cost

    def ways(self, book: Book) -> Iterator[dict[str, int]]:
        devices = book.policy.devices
        for count in range(1, min(book.policy.spread, len(devices)) + 1):
            for chosen in itertools.combinations(devices, count):
                yield self.ledger.known(dict.fromkeys(chosen, -(-book.need // count)))

    @staticmethod
    def have(way: Mapping[str, int], room: Room) -> bool:
        return all(need <= max(0, room(name)) for name, need in way.items())

    def tightness(self, way: Mapping[str, int]) -> tuple[int, int]:
        return len(way), -min(self.accounts[name].available for name in way if name != SLOTS)

    def cost(self, victims: Iterable[str]) -> float:
        return sum(self.scheduler._books[name].worth(1, self.now).seconds for name in victims)


CARDS = ("0", "1", "2", "3", "4")
SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def crowds(draw: st.DrawFn) -> Short:
    """Some cards, full of models that are idle, in use, pinned or on their way out, and other programs there."""
    names = CARDS[: draw(st.integers(1, 5))]
    devices = tuple(Device(name=name, total=draw(st.integers(2, 8)) * GIB) for name in names)
    there = {}
    for number in range(draw(st.integers(0, 7))):
        where = tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
        spread = draw(st.integers(1, len(where)))
        there[f"m{number}"] = model(
            draw(SIZES), devices=where, spread=spread, pinned=draw(st.integers(0, 5)) == 0, concurrency=9
        )
    new = model(draw(st.integers(1, 12)), devices=names, spread=draw(st.integers(1, len(names))))
    limits = Limits(max_loaded=draw(st.sampled_from([0, 0, 4])))
    driver = Short(0, limits, devices, new=new, **there)
    for name in there:
        ticket, found = driver.acquire(name)
        if name not in spawned(found):
            driver.cancel(ticket, name)
            continue
        driver.after(draw(st.integers(1, 9)))
        driver.ready(name)
        if draw(st.booleans()):
            driver.release(ticket, name)
        if draw(st.integers(0, 4)) == 0:
            driver.unload(name)
    free = {name: draw(st.integers(0, 8)) * GIB for name in names if draw(st.booleans())}
    if free:
        driver.tell(ev.Sampled(free, {}))
    return driver


@hypothesis.settings(max_examples=600, deadline=None)
@hypothesis.given(crowds(), st.dictionaries(st.sampled_from(CARDS), st.integers(0, 4 * GIB)), st.booleans())
def test_as_good_as_all_combinations(driver: Short, held: dict[str, int], impatient: bool) -> None:
    book = driver.scheduler._books["new"]
    if book.live:
        return
    verdict, shares, cost = Exhaustive(driver).plan(book, held, impatient=impatient)
    plan = driver.scheduler._admission.plan(book, driver.now, held, impatient=impatient)
    assert plan.verdict == verdict
    if verdict not in ("short", "refused"):
        assert plan.shares == shares
    assert Exhaustive(driver).cost(plan.victims) == cost


MANY = tuple(f"{number:02}" for number in range(16))


def farm(size: int, spread: int, **seconds: int) -> Short:
    """Sixteen cards of 4 GiB; on some an idle model of 3 GiB, whose load took so many seconds. The new one needs `size` GiB."""
    devices = tuple(Device(name=name, total=4 * GIB) for name in MANY)
    small = {name: model(3, devices=(name[1:],)) for name in seconds}
    driver = Short(0, Limits(), devices, new=model(size, devices=MANY, spread=spread), **small)
    for name, each in seconds.items():
        driver.load(name)
        driver.after(each)
        driver.ready(name)
    return driver


def test_of_many_cards_those_with_room() -> None:
    driver = farm(16, 16, **{f"c{name}": 5 for name in MANY if name not in ("01", "05", "08", "15")})
    assert spawned(driver.acquire("new")[1]) == ["new"]
    assert sorted(driver.view("new").reserved) == ["01", "05", "08", "15"]


def test_of_many_cards_those_that_cost_least_to_clear() -> None:
    cheap = {"c03": 5, "c06": 7, "c09": 6, "c12": 8}
    driver = farm(32, 8, **{**dict.fromkeys((f"c{name}" for name in MANY), 50), **cheap})
    victims = stopped(driver.acquire("new")[1])
    assert len(victims) == 8
    assert cheap.keys() <= set(victims)


def test_of_many_cards_those_on_which_nobody_works() -> None:
    driver = farm(32, 8, **{f"c{name}": 5 for name in MANY})
    for name in MANY[::2]:
        driver.acquire(f"c{name}")
    assert stopped(driver.acquire("new")[1]) == [f"c{name}" for name in MANY[1::2]]


def test_the_choice_among_many_cards_takes_no_time() -> None:
    driver = farm(32, 16, **{f"c{name}": 5 for name in MANY})
    began = time.process_time()
    assert len(stopped(driver.acquire("new")[1])) == 8
    assert time.process_time() - began < 0.2
