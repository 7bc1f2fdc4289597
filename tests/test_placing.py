"""On which cards a runner is, and that it is told: real processes, and a scripted driver library for the cards."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from mlxsup import Supervisor
from mlxsup.errors import DeadlineExceeded
from mlxsup.host import gpu_nvidia

from .crowding import gib, settings
from .host.test_gpu_nvidia import Script

pytestmark = pytest.mark.anyio

GIB = 1 << 30
ORDER, VISIBLE = "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two cards of 8 GiB; a test may change what is free of them."""
    cards = [{"total": 8 * GIB, "free": 8 * GIB}, {"total": 8 * GIB, "free": 8 * GIB}]
    monkeypatch.setattr(gpu_nvidia, "_SIGNS", ("",))
    monkeypatch.setattr(gpu_nvidia, "_import", lambda: Script(*cards))
    for name in (ORDER, VISIBLE):
        monkeypatch.delenv(name, raising=False)
    return cards


async def told(*others: dict[str, Any], **keys: Any) -> dict[str, str]:
    """What a runner with these keys is told of cards, when others are loaded: read from its process."""
    models = {f"other{number}": other for number, other in enumerate(others)}
    async with Supervisor(settings("8GiB", m=gib(**keys), **models)) as sup:
        for name in (*models, "m"):
            await sup.load(name)
        variables = psutil.Process(sup.report("m").pid).environ()
    return {name: variables[name] for name in (ORDER, VISIBLE) if name in variables}


async def test_a_runner_on_one_card_sees_that_card_alone(cards: list[dict[str, Any]]) -> None:
    assert await told(device="cuda:1") == {ORDER: "PCI_BUS_ID", VISIBLE: "1"}


async def test_a_runner_that_goes_where_there_is_room_is_told_where_that_is(cards: list[dict[str, Any]]) -> None:
    first = gib(device="cuda:0", memory="6GiB")
    assert await told(first, device="auto", memory="4GiB") == {ORDER: "PCI_BUS_ID", VISIBLE: "1"}


async def test_the_first_of_all_goes_where_other_programs_leave_room(cards: list[dict[str, Any]]) -> None:
    cards[0]["free"] = 3 * GIB
    assert await told(device="auto", memory="4GiB") == {ORDER: "PCI_BUS_ID", VISIBLE: "1"}


async def test_a_card_that_other_programs_fill_takes_nothing_until_they_leave_it(cards: list[dict[str, Any]]) -> None:
    cards[1]["free"] = 3 * GIB
    async with Supervisor(settings("8GiB", m=gib(device="cuda:1", memory="4GiB"))) as sup:
        with pytest.raises(DeadlineExceeded):
            await sup.load("m", deadline="2s")
        assert "other programs" in await sup.explain("m")
        cards[1]["free"] = 8 * GIB
        await sup.load("m")


async def test_one_that_is_too_large_for_a_card_is_spread_over_two_and_told_so(cards: list[dict[str, Any]]) -> None:
    assert await told(devices=2, memory="10GiB") == {ORDER: "PCI_BUS_ID", VISIBLE: "0,1"}


async def test_one_that_may_be_spread_and_need_not_is_on_one_card(cards: list[dict[str, Any]]) -> None:
    assert await told(devices=2, memory="1GiB") == {ORDER: "PCI_BUS_ID", VISIBLE: "0"}


async def test_one_that_shall_not_be_on_a_card_sees_none(cards: list[dict[str, Any]]) -> None:
    assert await told(device="cpu") == {ORDER: "PCI_BUS_ID", VISIBLE: ""}


async def test_nothing_is_said_where_nobody_chose(cards: list[dict[str, Any]]) -> None:
    assert await told() == {}
