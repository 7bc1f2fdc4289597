"""What happens around a supervisor in any phase of a runner's life: the clock is set, the disk fills, the configuration changes."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxsup import registry
from mlxsup.config import Settings
from mlxsup.errors import LoadTimeout, Unloaded
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, alive, collect, report, settings, state_is, supervisor, words

DAY = 86400.0


# The clock


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Put the wall clock so many seconds on."""
    real = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("phase", ["loading", "1", "sigterm"])
@pytest.mark.parametrize("days", [1, -1])
async def test_a_clock_that_is_set_ends_nothing_early(
    phase: str, days: int, set_clock: Callable[[float], None]
) -> None:
    """While a runner starts, drains or stops; each has its limit of some minutes."""
    limits: dict[str, Any] = {"load_timeout": "5m", "drain_timeout": "5m", "silence_timeout": "5m", "stop_grace": "5m"}
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@{phase}={gate.path}", **limits)) as sup:
        work = asyncio.create_task(collect(sup))
        unload: asyncio.Task[None] | None = None
        if phase == "sigterm":
            await work
            unload = asyncio.create_task(sup.unload("m"))
        arrival = await gate.arrival()
        if phase == "1":
            unload = asyncio.create_task(sup.unload("m"))
        await state_is(sup, {"loading": "starting", "1": "draining", "sigterm": "stopping"}[phase])
        await until(lambda: report(sup).pid > 0)  # it may be at the gate before we know that it was born
        before = report(sup)
        set_clock(days * DAY)
        await asyncio.sleep(1.5)  # time for a look or more, and for every timer to be set anew
        assert (report(sup).state, report(sup).pid) == (before.state, before.pid)
        arrival.go()
        async with asyncio.timeout(LIMIT):
            assert words(await work) == "t1 t2 t3 "
            await (unload or sup.unload("m"))
        assert report(sup).exit_code == 0


@pytest.mark.parametrize("days", [1, -1])
async def test_a_clock_that_is_set_lets_nothing_last(days: int, set_clock: Callable[[float], None]) -> None:
    """The limits are as long as ever, whichever way the clock was set."""
    limits: dict[str, Any] = {"load_timeout": "0.8s", "drain_timeout": "0.8s", "stop_grace": "0.8s"}
    async with (
        Gate() as gate,
        supervisor(
            loads=fake_runner(f"gate@loading={gate.path}; progress=none", **limits),
            drains=fake_runner(f"gate@1={gate.path}; ignore=SIGTERM", **limits),
        ) as sup,
    ):
        loading = asyncio.create_task(sup.load("loads"))
        work = asyncio.create_task(collect(sup, "drains"))
        for _ in range(2):
            await gate.arrival()
        began = time.monotonic()
        unload = asyncio.create_task(sup.unload("drains"))
        await state_is(sup, "draining", model="drains")
        set_clock(days * DAY)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(LoadTimeout):
                await loading
            with pytest.raises(Unloaded):
                await work
            await unload
        assert time.monotonic() - began >= 1.6
        assert report(sup, "drains").exit_signal == signal.SIGKILL


# The disk


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this program, or of a child it starts now, takes another byte."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("since", ["the start", "loading", "ready", "streaming", "draining", "stopping"])
async def test_a_disk_that_fills_costs_a_warning_and_no_answer(
    since: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxsup.records")
    monkeypatch.setattr(registry, "RECORD_AGAIN", 0.05)
    state = tmp_path / "mlxsup"
    monkeypatch.setenv("STATE_DIRECTORY", str(state))
    async with Gate() as gate:
        stations = "; ".join(f"gate@{phase}={gate.path}" for phase in ("loading", "1", "sigterm"))
        sup = supervisor(m=fake_runner(stations), n=fake_runner())
        with _filling(since) as fills:
            fills("the start")
            async with sup:
                load = asyncio.create_task(sup.load("m"))
                arrival = await gate.arrival("loading")
                fills("loading")
                arrival.go()
                await load
                fills("ready")
                work = asyncio.create_task(collect(sup))
                arrival = await gate.arrival("1")
                fills("streaming")
                unload = asyncio.create_task(sup.unload("m"))
                await state_is(sup, "draining")
                fills("draining")
                arrival.go()
                assert words(await work) == "t1 t2 t3 "
                arrival = await gate.arrival("sigterm")
                fills("stopping")
                arrival.go()
                async with asyncio.timeout(LIMIT):
                    await unload
                assert words(await collect(sup, "n")) == "t1 t2 t3 "
                await until(lambda: "no record of runners is kept, for now" in caplog.text)
                fills("")
                await until(lambda: "the record of runners is kept again" in caplog.text)
                (record,) = state.glob("*/record.json")
                groups = json.loads(record.read_text())["groups"]
                assert [group["pgid"] for group in groups] == [report(sup, "n").pid]
    assert caplog.text.count("no record of runners is kept, for now") == 1
    assert not [*state.glob("*/")]


@contextmanager
def _filling(since: str) -> Iterator[Callable[[str], None]]:
    """Let the disk be full from the phase `since` until `fills("")`."""
    with ExitStack() as stack:

        def fills(phase: str) -> None:
            if phase == since:
                stack.enter_context(full_disk())
            elif not phase:
                stack.close()

        yield fills


# The configuration


async def test_whatever_races_with_reloads_the_last_word_counts(tmp_path: Path) -> None:
    """Loads, unloads and reloads at growing distances: in the end one process runs, as the last configuration has it."""
    record = Record(tmp_path)

    def configured(tokens: int) -> dict[str, Any]:
        return fake_runner(f"record={record.path}; tokens={tokens}")

    async with supervisor(m=configured(1)) as sup:
        for turn in range(12):
            tasks = [asyncio.create_task(_ended_somehow(sup.load("m"))) for _ in range(2)]
            await asyncio.sleep(0.004 * turn)
            steps = [sup.reload(settings(m=configured(2 + turn))), sup.unload("m", force=turn % 3 == 0)]
            tasks += [asyncio.create_task(_ended_somehow(step)) for step in steps[:: 1 if turn % 2 else -1]]
            tasks.append(asyncio.create_task(_ended_somehow(collect(sup))))
            async with asyncio.timeout(LIMIT):
                await asyncio.gather(*tasks)
                answer = words(await collect(sup))
            assert answer.split() == [f"t{number + 1}" for number in range(2 + turn)]
            assert [pid for pid in record.pids() if alive(pid)] == [report(sup).pid]
        await sup.unload("m")
        await sup.reload(Settings())
        await until(lambda: sup.status().runners == [])
        assert not any(map(alive, record.pids()))


async def _ended_somehow(work: Any) -> None:
    """Wait for the end of what may be overtaken by an unload."""
    try:
        await work
    except Unloaded:
        return
