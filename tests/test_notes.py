"""Memory that runners really take is seen within two seconds, and why a model is as it is, is told in a few words."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import DoesNotFit, LoadFailed, RunnerDied
from mlxsup.runners.process import Process
from mlxsup.testing import EventRecorder, Gate, fake_runner
from tests import waiting

from .crowding import settings

pytestmark = pytest.mark.anyio
LIMIT = 15.0
until = functools.partial(waiting.until, limit=LIMIT)
SEEN = 2.0
BUSY_MACHINE = 1.0
"""Seconds on top, as other tests run beside this one."""
MIB = 1 << 20
KEPT = 457 * MIB
"""What is never given out of a device."""


def small(scenario: str = "", **keys: Any) -> dict[str, Any]:
    return fake_runner(scenario, **{"memory": "64MiB", "stop_grace": "2s", **keys})


async def words(sup: Supervisor, model: str) -> None:
    async with sup.completion(model, prompt="p") as chunks:
        async for _ in chunks:
            pass


def note(sup: Supervisor, model: str) -> str:
    return sup.report(model).note


def told(events: EventRecorder, words: str) -> list[tuple[str, str, str]]:
    """The events that say so: whose, and from which state to which."""
    return [(event.model, event.previous, event.state) for event in events.events if words in event.reason]


async def test_growth_by_200_megabytes_is_seen_within_two_seconds(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        Gate() as gate,
        Supervisor(settings(a=small(f"gate@1={gate.path}; alloc@1=200; gate@2={gate.path}"))) as sup,
        EventRecorder(sup) as events,
        anyio.create_task_group() as work,
    ):
        work.start_soon(words, sup, "a")
        arrival = await gate.arrival("1")
        await until(lambda: sup.report("a").memory.measured)
        assert (note(sup, "a"), sup.status().devices[0].reserved) == ("", 64 * MIB)
        arrival.go()
        arrival = await gate.arrival("2")
        took = await until(lambda: sup.report("a").memory.measured > 200 * MIB)
        assert took < SEEN + BUSY_MACHINE
        assert sup.status().devices[0].reserved == sup.report("a").memory.measured
        assert "more than declared" in note(sup, "a")
        assert note(sup, "a").startswith("uses 2")
        await until(lambda: ("a", "ready", "ready") in told(events, "were reserved"))
        assert "of cpu where 64.0 MiB were reserved" in caplog.text
        arrival.go()


async def test_the_note_of_one_that_has_just_died_ends_before_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, looked = Process.sweep, anyio.Event()

    async def sweep_later(process: Process) -> list[int] | None:
        await looked.wait()
        return await sweep(process)

    monkeypatch.setattr(Process, "sweep", sweep_later)
    async with Supervisor(settings(a=small("crash@1"))) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(RunnerDied):
            await words(sup, "a")
        found = sup.report("a")
        looked.set()
        assert (found.state, found.note) == ("stopping", "the runner of a died")


async def test_a_device_that_runs_low_is_told_until_there_is_room_again() -> None:
    total = f"{(KEPT + 200 * MIB) // MIB}MiB"
    async with (
        Gate() as gate,
        Supervisor(settings(total, a=small(f"alloc@1=200; gate@2={gate.path}"), b=small())) as sup,
        EventRecorder(sup) as events,
    ):
        (device,) = sup.status().devices
        assert (device.low, device.note) == (False, "")
        working = asyncio.create_task(words(sup, "a"))
        arrival = await gate.arrival("2")
        await until(lambda: sup.status().devices[0].low)
        words_for_it = sup.status().devices[0].note
        assert words_for_it.startswith("low on memory: no new loads until ")
        assert words_for_it.endswith(" more are free")
        await until(lambda: told(events, "no idle model can be put out"))
        loading = asyncio.create_task(sup.load("b"))
        await until(lambda: note(sup, "b") == "waiting for memory")
        arrival.go()
        await working
        await loading  # a is idle now, and goes
        assert note(sup, "a").startswith("put out ")
        await until(lambda: not sup.status().devices[0].note)


async def test_why_a_model_is_not_there() -> None:
    models = {
        "broken": small("exit=3"),
        "huge": small(memory="4096GiB"),
        "killed": small("crash@loading=SIGKILL"),
        "idle": small(keep_alive="1ms"),
        "stopped": small(),
        "old": small(memory="1GiB"),
        "new": small(memory="1GiB"),
    }
    async with Supervisor(settings("2GiB", **models)) as sup:
        for model in ("broken", "huge", "killed"):
            with pytest.raises((LoadFailed, DoesNotFit)):
                await sup.load(model)
        assert note(sup, "broken") == "exit code 3"
        assert note(sup, "huge") == "does not fit"
        assert note(sup, "killed") == "SIGKILL"
        again = asyncio.create_task(sup.load("broken"))
        await until(lambda: sup.report("broken").state == "backoff")
        assert note(sup, "broken") in ("backing off 0 s after exit code 3", "backing off 1 s after exit code 3")
        with pytest.raises(LoadFailed):
            await again
        await sup.load("stopped")
        assert note(sup, "stopped") == ""
        await sup.unload("stopped")
        await sup.load("idle")
        await until(lambda: sup.report("idle").state == "stopped")
        await sup.load("old")
        await sup.load("new")
        assert [note(sup, model) for model in ("stopped", "idle", "old", "new")] == [
            "unload asked for",
            "idle for 0.001 s",
            "put out for new",
            "",
        ]
        assert sup.report("old").reason.startswith("put out for new: new needs 1.0 GiB on cpu, ")
