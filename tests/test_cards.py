"""What is free of cards and who holds how much of them, though their driver hangs or tells little: a scripted one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.host import cards as looks
from mlxsup.host import gpu_nvidia
from mlxsup.host.cards import Cards
from mlxsup.learnt import Learnt
from mlxsup.machine import Machine, Use
from mlxsup.protocol import RunnerMemory
from mlxsup.runners.footprint import Watched

from .crowding import gib, settings
from .host.test_gpu_nvidia import Script, process
from .test_returning import until

pytestmark = pytest.mark.anyio

GIB = 1 << 30
US = os.getpid()
NOT_HERE = 10_000_001
"""A pid of the host, in a container that has pids of its own."""


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two cards of 8 GiB; a test may change what they say."""
    cards = [{"total": 8 * GIB, "free": 8 * GIB}, {"total": 8 * GIB, "free": 8 * GIB}]
    monkeypatch.setattr(gpu_nvidia, "_SIGNS", ("",))
    monkeypatch.setattr(gpu_nvidia, "_import", lambda: Script(*cards))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return cards


@pytest.fixture
def machine(tmp_path: Path, cards: list[dict[str, Any]]) -> Iterator[Machine]:
    made = Machine(Learnt(tmp_path))
    made.find_devices()
    yield made
    made.close()


@pytest.fixture
def hang(cards: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], threading.Event]]:
    """Make the driver hang on the first card until the event is set."""
    monkeypatch.setattr(looks, "LOOK_LIMIT", 0.2)
    gate = threading.Event()

    def begin() -> threading.Event:
        cards[0]["hangs"] = gate
        return gate

    yield begin
    gate.set()
    for thread in asking():
        thread.join()


def asking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlxsup cards"]


def runner(share: int, *, loaded: bool = True, told: RunnerMemory | None = None) -> Watched:
    return Watched(US, {"cuda:0": share}, busy=not loaded, told=told, loaded=loaded)


async def on_card(machine: Machine, runners: Mapping[str, Watched]) -> tuple[dict[str, int], Use]:
    seen = await machine.look(runners)
    return {model: use["cuda:0"] for model, use in seen.used.items()}, seen.needed


# Who holds what


async def test_what_the_driver_tells_of_a_runner_is_what_counts(machine: Machine, cards: list[dict[str, Any]]) -> None:
    cards[0] |= {"free": GIB, "computing": [process(US, 2 * GIB), process(NOT_HERE, 5 * GIB)]}
    used, needed = await on_card(machine, {"m": runner(4 * GIB)})
    assert used == {"m": 2 * GIB}
    assert needed["m"]["cuda:0"] == 2 * GIB


async def test_a_loaded_runner_that_the_driver_does_not_name_has_what_nobody_known_has(
    machine: Machine, cards: list[dict[str, Any]]
) -> None:
    cards[0] |= {"free": 3 * GIB, "computing": [process(NOT_HERE, 5 * GIB)]}
    used, needed = await on_card(machine, {"m": runner(4 * GIB)})
    assert used == {"m": 4 * GIB}
    assert needed["m"]["cuda:0"] == 0  # nothing is learnt from it
    used, _ = await on_card(machine, {"m": runner(6 * GIB)})
    assert used == {"m": 5 * GIB}
    used, _ = await on_card(machine, {"m": runner(6 * GIB, loaded=False)})
    assert used == {"m": 0}


async def test_what_others_hold_that_are_known_is_none_of_it(machine: Machine, cards: list[dict[str, Any]]) -> None:
    cards[0] |= {"free": 3 * GIB, "computing": [process(os.getppid(), 4 * GIB)]}
    used, _ = await on_card(machine, {"m": runner(4 * GIB)})
    assert used == {"m": GIB}
    cards[0]["computing"] = [process(os.getppid(), 6 * GIB)]  # it has grown between the two questions
    used, _ = await on_card(machine, {"m": runner(4 * GIB)})
    assert used == {"m": 0}


async def test_what_is_left_is_divided_among_runners_that_are_not_named(
    machine: Machine, cards: list[dict[str, Any]]
) -> None:
    cards[0] |= {"free": 5 * GIB}
    runners = {"a": runner(4 * GIB), "b": runner(2 * GIB), "c": runner(GIB, loaded=False)}
    assert (await on_card(machine, runners))[0] == {"a": 2 * GIB, "b": GIB, "c": 0}
    told = runner(2 * GIB, told=RunnerMemory(active=2 * GIB))
    assert (await on_card(machine, runners | {"b": told}))[0] == {"a": GIB, "b": 2 * GIB, "c": 0}


async def test_in_a_container_memory_of_a_runner_does_not_count_twice(cards: list[dict[str, Any]]) -> None:
    entries = {name: gib(device="cuda:0", memory=memory) for name, memory in {"a": "4GiB", "b": "3GiB"}.items()}
    async with Supervisor(settings("8GiB", **entries)) as sup:
        await sup.load("a")
        cards[0] |= {"free": 4 * GIB, "computing": [process(NOT_HERE, 4 * GIB)]}
        await sup.load("b", deadline="15s")
        assert sup.report("a").state == "ready"


async def test_a_card_whose_processes_may_not_be_listed_is_known_to_be_full(cards: list[dict[str, Any]]) -> None:
    for card in cards:
        card["unlisted"] = True
    cards[0]["free"] = GIB
    async with Supervisor(settings("8GiB", m=gib(device="auto", memory="4GiB"))) as sup:
        await sup.load("m")
        reserved = {each.name: each.reserved for each in sup.status().devices}
    assert (reserved["cuda:0"], reserved["cuda:1"]) == (0, 4 * GIB)


# Who is asked


async def test_cards_on_which_nobody_is_are_asked_for_those_who_wait_to_come_back(
    machine: Machine, cards: list[dict[str, Any]]
) -> None:
    machine.devices(parse({"models": {"m": gib(device="cuda:1")}}, KEYS))
    assert "cuda:1" not in (await machine.look({})).free
    cards[1]["free"] = 3 * GIB
    assert (await machine.look({}, all_cards=True)).free["cuda:1"] == 3 * GIB


async def test_one_that_other_programs_crowded_out_of_a_card_comes_back(cards: list[dict[str, Any]]) -> None:
    async with Supervisor(settings("8GiB", home=gib(device="cuda:1") | {"return": True})) as sup:
        await sup.load("home")
        cards[1]["free"] = 0
        await until(sup, "home", "stopped")
        cards[1]["free"] = 8 * GIB
        await until(sup, "home", "ready")


# A driver that hangs


async def test_a_driver_that_hangs_costs_one_thread_and_leaves_the_last_figures(
    cards: list[dict[str, Any]], hang: Callable[[], threading.Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    driver = Cards()
    assert (await driver.look(["cuda:0"]))["cuda:0"].free == 8 * GIB
    gate = hang()
    cards[0]["free"] = GIB
    for _ in range(5):
        assert (await driver.look(["cuda:0"]))["cuda:0"].free == 8 * GIB
        assert len(asking()) == 1
    assert caplog.text.count("does not answer") == 1
    gate.set()
    with anyio.fail_after(10):
        while (await driver.look(["cuda:0"]))["cuda:0"].free != GIB:
            await anyio.sleep(0.01)
    assert caplog.text.count("answers again") == 1


async def test_what_a_slow_driver_says_too_late_counts_from_then_on(
    cards: list[dict[str, Any]], hang: Callable[[], threading.Event]
) -> None:
    driver = Cards()
    gate = hang()
    assert await driver.look(["cuda:0"]) == {}
    gate.set()
    with anyio.fail_after(10):
        while asking():
            await anyio.sleep(0.01)
    await anyio.sleep(0.01)  # the loop is told
    cards[0]["hangs"] = again = threading.Event()
    try:
        assert (await driver.look(["cuda:0"]))["cuda:0"].free == 8 * GIB
    finally:
        again.set()


async def test_a_card_that_no_longer_answers_has_no_figures(cards: list[dict[str, Any]]) -> None:
    driver = Cards()
    assert set(await driver.look(["cuda:0", "cuda:1"])) == {"cuda:0", "cuda:1"}
    cards.pop()
    assert set(await driver.look(["cuda:0", "cuda:1"])) == {"cuda:0"}


async def test_a_driver_that_hangs_from_the_first_look_on_leaves_what_was_found(
    machine: Machine, hang: Callable[[], threading.Event]
) -> None:
    hang()
    with anyio.fail_after(5):
        _, needed = await on_card(machine, {"m": runner(4 * GIB)})
    assert needed["m"]["cuda:0"] == 0
    assert (await machine.look({"m": runner(4 * GIB)})).free["cuda:0"] == 8 * GIB


async def test_models_are_loaded_while_a_driver_hangs(hang: Callable[[], threading.Event]) -> None:
    async with Supervisor(settings("8GiB", card=gib(device="cuda:0"), ram=gib())) as sup:
        await sup.load("card")
        hang()
        await sup.load("ram", deadline="15s")
