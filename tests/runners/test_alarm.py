"""An alarm rings for the wait that lasts too long, and for no other, however many there were."""

from __future__ import annotations

import asyncio
import time

import pytest

from mlxsup.runners.alarm import Alarm

pytestmark = pytest.mark.anyio


class Bell:
    def __init__(self) -> None:
        self.rang_at = 0.0
        self.rang = asyncio.Event()
        self.alarm = Alarm(self._ring)

    def _ring(self) -> None:
        assert not self.rang.is_set()
        self.rang_at = time.monotonic()
        self.rang.set()

    def wait(self, seconds: float) -> float:
        due = time.monotonic() + seconds
        self.alarm.set(due)
        return due

    async def rings(self, due: float) -> None:
        async with asyncio.timeout(10):
            await self.rang.wait()
        assert due <= self.rang_at < due + 5


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.05])
async def test_it_rings_when_a_wait_lasts_too_long(seconds: float) -> None:
    bell = Bell()
    await bell.rings(bell.wait(seconds))


async def test_a_later_wait_takes_the_place_of_an_earlier_one() -> None:
    bell = Bell()
    bell.wait(0.02)
    await bell.rings(bell.wait(0.2))


async def test_a_shorter_wait_is_not_held_up_by_a_longer_one() -> None:
    bell = Bell()
    bell.wait(600)
    bell.alarm.hush()
    await bell.rings(bell.wait(0.02))
    bell.alarm.cancel()


async def test_a_wait_after_a_hushed_one_counts() -> None:
    bell = Bell()
    bell.wait(0.01)
    bell.alarm.hush()
    await asyncio.sleep(0.05)  # long enough to ring, on purpose
    assert not bell.rang.is_set()
    await bell.rings(bell.wait(0.02))


@pytest.mark.parametrize("end", [Alarm.hush, Alarm.cancel])
async def test_a_wait_that_ended_does_not_ring(end: object) -> None:
    assert callable(end)
    bell = Bell()
    bell.wait(0.01)
    end(bell.alarm)
    await asyncio.sleep(0.05)  # long enough to ring, on purpose
    assert not bell.rang.is_set()


async def test_many_waits_cost_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    bell = Bell()
    looks: list[None] = []
    look_later = Alarm._look_later

    def counted(alarm: Alarm) -> None:
        looks.append(None)
        look_later(alarm)

    monkeypatch.setattr(Alarm, "_look_later", counted)
    for _ in range(1000):
        bell.wait(60)
        bell.alarm.hush()
    bell.alarm.cancel()
    assert len(looks) == 1
