"""How soon is at once: a death is known, and the work of a client that leaves is aborted, within a tenth of a second."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from mlxsup import Supervisor
from mlxsup.errors import MlxsupError
from mlxsup.testing import Arrival, Gate, fake_runner
from tests.waiting import until

from .house import Record, collect, kill, promised, report, state_is, supervisor, words

AT_ONCE = 0.1
STATES = pytest.mark.parametrize("phase", ["start", "loading", "ready", "request", "first", "1", "sigterm"])


@STATES
async def test_a_death_is_known_to_all_at_once(phase: str) -> None:
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@{phase}={gate.path}")) as sup:

        async def attempt() -> float:
            told: list[float] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_note_end, sup, phase, told)
                await gate.arrival()
                await until(lambda: report(sup).pid > 0)  # the child may be quicker than the loop that has started it
                if phase == "ready":
                    await state_is(sup, "ready")
                began = time.monotonic()
                kill(report(sup).pid)
                await until(lambda: report(sup).pid < 0 and report(sup).state not in ("starting", "ready"))
                seen = time.monotonic() - began
            await state_is(sup, "failed", "backoff", "stopped")
            return max(seen, told[0] - began)

        await promised(AT_ONCE, attempt)


async def _note_end(sup: Supervisor, phase: str, told: list[float]) -> None:
    """Note when the one who waits learns of the end; in phase `ready` nobody waits."""
    try:
        await sup.load("m")
        if phase == "sigterm":
            await sup.unload("m")
        elif phase != "ready":
            await collect(sup)
    except MlxsupError:
        pass
    told.append(time.monotonic() if phase != "ready" else 0.0)


async def test_a_runner_that_is_stopped_is_seen_within_two_seconds() -> None:
    async with supervisor(m=fake_runner()) as sup:

        async def attempt() -> float:
            await sup.load("m")
            kill(report(sup).pid, signal.SIGSTOP)
            return await state_is(sup, "failed")

        await promised(2.0, attempt)


@pytest.mark.parametrize("address", ["unix", "tcp"])
@pytest.mark.parametrize("phase", ["queued", "loading", "request", "first", "1"])
async def test_who_leaves_stops_the_work_at_once(tmp_path: Path, phase: str, address: Any) -> None:
    record = Record(tmp_path)
    gated = "1" if phase == "queued" else phase
    async with Gate() as gate:
        entry = fake_runner(f"record={record.path}; gate@{gated}={gate.path}", address=address, concurrency=1)
        async with supervisor(m=entry) as sup:

            async def attempt() -> float:
                gone = len(record.lines("gone"))
                async with anyio.create_task_group() as tasks:
                    if phase == "queued":
                        tasks.start_soon(collect, sup)
                    scope = anyio.CancelScope()
                    arrival = await _begin(sup, phase, tasks, scope, gate)
                    began = time.monotonic()
                    scope.cancel()
                    if phase not in ("queued", "loading"):
                        await arrival.left()
                        await until(lambda: len(record.lines("gone")) > gone)
                    await until(lambda: report(sup).queue == 0 and report(sup).leases == (phase == "queued"))
                    took = time.monotonic() - began
                    arrival.go()
                if phase == "loading":
                    await state_is(sup, "ready")
                    await sup.unload("m")
                return took

            await promised(AT_ONCE, attempt)
            gate.open()
            assert words(await collect(sup)) == "t1 t2 t3 "


async def _begin(
    sup: Supervisor, phase: str, tasks: anyio.abc.TaskGroup, scope: anyio.CancelScope, gate: Gate
) -> Arrival:
    """Start the work that will be left, and wait until it is as far as the phase says."""

    async def work() -> None:
        with scope:
            await collect(sup)

    if phase != "queued":
        tasks.start_soon(work)
        return await gate.arrival()
    arrival = await gate.arrival()
    tasks.start_soon(work)
    await until(lambda: report(sup).queue == 1)
    return arrival
