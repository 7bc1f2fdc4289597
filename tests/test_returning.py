"""Who comes back by itself, with real processes: somebody must look whether there is room, though nothing runs."""

from __future__ import annotations

import os

import anyio
import pytest

from mlxsup import Supervisor, host
from mlxsup.scheduling.scheduler import Limits

from .crowding import gib, settings

pytestmark = pytest.mark.anyio
LIMIT = 15.0
MUCH, LITTLE = 4 << 30, 200 << 20


class Others:
    """What other programs leave free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.leave = MUCH
        self.looks = 0
        monkeypatch.setattr(host.Gauge, "free", lambda _: self._look())

    def _look(self) -> int:
        self.looks += 1
        return self.leave

    async def are_looked_at(self, times: int) -> None:
        end = self.looks + times
        with anyio.fail_after(LIMIT):
            while self.looks < end:
                await anyio.sleep(0.01)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    return Others(monkeypatch)


async def until(sup: Supervisor, model: str, *states: str) -> None:
    with anyio.fail_after(LIMIT):
        while sup.report(model).state not in states:
            await anyio.sleep(0.01)


async def test_it_comes_back_though_nothing_was_left_to_look_at(others: Others) -> None:
    async with Supervisor(settings("4GiB", home=gib() | {"return": True})) as sup:
        await sup.load("home")
        others.leave = LITTLE
        await until(sup, "home", "stopped")
        await others.are_looked_at(3)
        assert sup.report("home").state == "stopped"
        others.leave = MUCH
        await until(sup, "home", "ready")


async def test_a_pinned_one_that_crashed_while_memory_was_short_comes_up(
    others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxsup.registry.limits", lambda _settings: Limits(patience=0.2))
    async with Supervisor(settings("4GiB", a=gib(pinned=True))) as sup:
        await sup.load("a")
        pid = sup.report("a").pid
        others.leave = LITTLE
        os.kill(pid, 9)
        await until(sup, "a", "backoff")
        await others.are_looked_at(3)
        assert "loaded when that has changed" in sup.report("a").note
        assert sup.report("a").state == "backoff"
        others.leave = MUCH
        await until(sup, "a", "ready")
        assert sup.report("a").pid != pid


async def test_a_preloaded_one_that_changed_is_loaded_anew_and_one_put_out_by_hand_is_not() -> None:
    def configuration(tokens: int) -> dict[str, object]:
        return gib(f"tokens={tokens}", preload=True)

    async with Supervisor(settings("4GiB", a=gib(preload=True), b=configuration(1))) as sup:
        await until(sup, "a", "ready")
        await until(sup, "b", "ready")
        await sup.unload("a")
        pid = sup.report("b").pid
        await sup.reload(settings("4GiB", a=gib(preload=True), b=configuration(2), c=configuration(1)))
        await until(sup, "c", "ready")
        await until(sup, "b", "ready")
        assert sup.report("b").pid != pid
        assert sup.report("a").state == "stopped"
