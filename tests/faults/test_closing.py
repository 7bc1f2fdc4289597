"""Ending a runner: the group is gone when it is said to be gone, whatever the runner thinks of it."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import ShuttingDown, Unloaded
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, alive, collect, kill, report, settings, state_is, supervisor, words

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a process that left the group is found in /proc")


@pytest.mark.parametrize("scenario", ["", "stderr@sigterm=bye", "delay@sigterm=0.2"])
async def test_unload_returns_when_the_process_is_gone(tmp_path: Path, scenario: str) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; {scenario}")) as sup:
        await sup.load("m")
        await sup.unload("m")
        assert not alive(record.pids()[0])
        assert report(sup).state == "stopped"
        assert report(sup).pid == -1
        assert record.lines("signal") == ["signal SIGTERM"]
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert len(record.pids()) == 2


async def test_own_stop_signal(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}", stop_signal="SIGINT")) as sup:
        await sup.load("m")
        await sup.unload("m")
        assert record.lines("signal") == ["signal SIGINT"]


async def test_one_that_ignores_the_signal_is_killed_after_its_grace(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; ignore=SIGTERM", stop_grace="0.4s")) as sup:
        await sup.load("m")
        began = time.monotonic()
        await sup.unload("m")
        assert 0.4 <= time.monotonic() - began < 1.4
        assert not alive(record.pids()[0])


@pytest.mark.parametrize("phase", ["loading", "ready", "1", "sigterm"])
async def test_one_that_stopped_itself_still_ends(tmp_path: Path, phase: str) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; freeze@{phase}", stop_grace="0.5s")) as sup:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_ignore_unloaded, sup)
            await until(record.pids)
            await anyio.sleep(0.3)
            began = time.monotonic()
            await sup.unload("m", force=True)
            assert time.monotonic() - began < 1.5
        assert not alive(record.pids()[0])


async def _ignore_unloaded(sup: Supervisor) -> None:
    try:
        await collect(sup)
    except Unloaded:
        return


@pytest.mark.parametrize(
    "options",
    [
        "",
        "ignore",
        "nopipes",
        "orphan",
        *(pytest.param(one, marks=LINUX) for one in ("setsid", "setsid+ignore", "setsid+orphan")),
    ],
)
async def test_unload_returns_when_no_grandchild_is_left(tmp_path: Path, options: str) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; fork@ready={options}", stop_grace="0.5s")) as sup:
        await sup.load("m")
        await until(lambda: record.pids("fork"))
        (pid,) = record.pids("fork")
        assert alive(pid)
        with anyio.fail_after(2):
            await sup.unload("m")
        assert not alive(pid)
        assert not alive(record.pids()[0])


@pytest.mark.parametrize(
    "options", ["", "ignore", *(pytest.param(one, marks=LINUX) for one in ("setsid", "setsid+ignore+orphan"))]
)
async def test_death_is_seen_at_once_while_a_grandchild_holds_the_pipes(tmp_path: Path, options: str) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; fork@ready={options}; stderr@ready=up")) as sup:
        await sup.load("m")
        await until(lambda: record.pids("fork") and sup.logs("m"))
        kill(report(sup).pid)
        assert await state_is(sup, "failed", "backoff") < 1
        (pid,) = record.pids("fork")
        await until(lambda: not alive(pid))
        assert sup.logs("m") == ["up"]


async def test_unloading_twice_at_once_and_again_is_fine() -> None:
    async with supervisor(m=fake_runner("delay@sigterm=0.2"), n=fake_runner("")) as sup:
        await sup.load("m")
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                for force in (False, True, False):
                    tasks.start_soon(_unload, sup, force)
            await sup.unload("m")
            await sup.unload("n")
        assert report(sup).state == "stopped"
        assert report(sup).exits == 1


async def _unload(sup: Supervisor, force: bool) -> None:
    await sup.unload("m", force=force)


@pytest.mark.parametrize("phase", ["start", "bind", "loading"])
@pytest.mark.parametrize("scenario", ["", "ignore=SIGTERM"])
async def test_unloading_while_starting(tmp_path: Path, phase: str, scenario: str) -> None:
    record = Record(tmp_path)
    entry = fake_runner(f"record={record.path}; {scenario}; hang@{phase}", stop_grace="0.3s")
    async with supervisor(m=entry) as sup:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_ignore_unloaded, sup)
            await until(record.pids)
            with anyio.fail_after(LIMIT):
                await sup.unload("m")
        assert report(sup).state == "stopped"
        assert not alive(record.pids()[0])


async def test_unloading_in_the_very_moment_of_the_start(tmp_path: Path) -> None:
    """Whatever is half made then: nothing is left, and the model can be loaded again."""
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}")) as sup:
        for turns in range(0, 24, 2):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_ignore_unloaded, sup)
                for _ in range(turns):
                    await anyio.sleep(0.001)
                with anyio.fail_after(LIMIT):
                    await sup.unload("m")
            await sup.unload("m")  # the first may have come before there was anything to unload
            assert not any(map(alive, record.pids()))
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_drain_lets_work_in_flight_end_and_later_callers_get_a_new_runner(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"record={record.path}; gate@1#1={gate.path}; tokens=2")) as sup,
    ):
        answers: list[str] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_collect_into, sup, answers)
            arrival = await gate.arrival()
            tasks.start_soon(sup.unload, "m")
            await state_is(sup, "draining")
            tasks.start_soon(_collect_into, sup, answers)
            await until(lambda: report(sup).queue == 1)
            assert alive(record.pids()[0])
            assert len(record.lines("request")) == 1
            arrival.go()
            second = await gate.arrival()
            assert answers == ["t1 t2 "]
            second.go()
        assert answers == ["t1 t2 ", "t1 t2 "]
        assert len(record.pids()) == 2
        assert not alive(record.pids()[0])


async def _collect_into(sup: Supervisor, answers: list[str]) -> None:
    answers.append(words(await collect(sup)))


async def test_drain_has_a_deadline() -> None:
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"gate@1={gate.path}", drain_timeout="0.3s")) as sup,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_expect_unloaded, sup)
        await gate.arrival()
        began = time.monotonic()
        await sup.unload("m")
        assert 0.3 <= time.monotonic() - began < 2


async def test_what_a_reload_removed_has_its_drain_timeout_at_the_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsup.registry.CLOSE_MARGIN", 0.2)
    others = {"n": fake_runner(drain_timeout="0s", stop_grace="0.1s")}
    async with Gate() as gate:
        sup = await supervisor(m=fake_runner(f"gate@1={gate.path}", drain_timeout="1h"), **others).__aenter__()
        answer = asyncio.create_task(collect(sup))
        arrival = await gate.arrival()
        await sup.reload(settings(**others))
        leaving = asyncio.create_task(sup.__aexit__(None, None, None))
        assert await asyncio.wait({leaving}, timeout=1) == (set(), {leaving})
        arrival.go()
        with anyio.fail_after(LIMIT):
            await leaving
            assert words(await answer) == "t1 t2 t3 "


async def test_force_does_not_wait_and_the_stream_learns_why() -> None:
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"gate@1={gate.path}")) as sup,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_expect_unloaded, sup)
        await gate.arrival()
        with anyio.fail_after(2):
            await sup.unload("m", force=True)


async def test_force_cuts_a_drain_short() -> None:
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"gate@1={gate.path}")) as sup,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_expect_unloaded, sup)
        await gate.arrival()
        tasks.start_soon(sup.unload, "m")
        await state_is(sup, "draining")
        with anyio.fail_after(2):
            await sup.unload("m", force=True)


async def _expect_unloaded(sup: Supervisor) -> None:
    with pytest.raises(Unloaded):
        await collect(sup)


async def test_a_lease_holds_the_runner_until_it_is_given_back() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        async with anyio.create_task_group() as tasks:
            async with sup.lease("m") as lease:
                assert lease.base_url
                pid = report(sup).pid
                tasks.start_soon(sup.unload, "m")
                await state_is(sup, "draining")
                await anyio.sleep(0.1)
                assert alive(pid)
            await state_is(sup, "stopped")
        assert not alive(pid)


async def test_a_lease_is_no_protection_against_force() -> None:
    async with supervisor(m=fake_runner("")) as sup, sup.lease("m"):
        pid = report(sup).pid
        with anyio.fail_after(2):
            await sup.unload("m", force=True)
        assert not alive(pid)
        assert report(sup).state == "stopped"


async def test_leaving_lets_work_in_flight_end_and_refuses_new_work() -> None:
    async with Gate() as gate:
        answers: list[str] = []
        async with anyio.create_task_group() as tasks:
            async with supervisor(m=fake_runner(f"gate@1={gate.path}")) as sup:
                tasks.start_soon(_collect_into, sup, answers)
                arrival = await gate.arrival()
                tasks.start_soon(sup.drain)
                await until(lambda: sup.status().closing)
                with pytest.raises(ShuttingDown):
                    await collect(sup)
                arrival.go()
            assert answers == ["t1 t2 t3 "]


async def test_leaving_stops_all_runners_side_by_side(tmp_path: Path) -> None:
    record = Record(tmp_path)
    entry = fake_runner(f"record={record.path}; ignore=SIGTERM", stop_grace="0.5s")
    async with supervisor(**{f"m{number}": entry for number in range(6)}) as sup:
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(sup.load, f"m{number}")
        began = time.monotonic()
    assert time.monotonic() - began < 2.5
    assert len(record.pids()) == 6
    assert not any(map(alive, record.pids()))


async def test_idle_runners_are_unloaded_after_their_keep_alive() -> None:
    async with supervisor(m=fake_runner("", keep_alive="0.5s"), n=fake_runner("", keep_alive=0)) as sup:
        await collect(sup, "n")
        assert await state_is(sup, "stopped", model="n") < 1
        await collect(sup)
        assert report(sup).state == "ready"
        assert 0.3 < await state_is(sup, "stopped") < 2
