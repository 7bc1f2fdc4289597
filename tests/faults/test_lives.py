"""Supervisors come and go in one program: several at once, again and again, across tasks, and when descriptors run out."""

from __future__ import annotations

import asyncio
import os
import resource
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import LoadFailed, MlxsupError, ResourceExhausted, ShuttingDown
from mlxsup.supervisor import Events
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, alive, collect, report, settings, supervisor, words


async def test_two_supervisors_in_one_program_know_nothing_of_each_other(tmp_path: Path) -> None:
    record = Record(tmp_path)
    entry = fake_runner(f"record={record.path}")
    async with supervisor(m=entry) as one:
        async with supervisor(m=entry) as other:
            assert words(await collect(one)) == words(await collect(other)) == "t1 t2 t3 "
            assert report(one).pid != report(other).pid
        assert report(one).state == "ready"
        assert alive(report(one).pid)
        assert words(await collect(one)) == "t1 t2 t3 "
    assert not any(map(alive, record.pids()))


async def test_a_supervisor_can_be_used_twice(tmp_path: Path) -> None:
    record = Record(tmp_path)
    sup = supervisor(m=fake_runner(f"record={record.path}"))
    for _ in range(3):
        async with sup:
            assert words(await collect(sup)) == "t1 t2 t3 "
        with pytest.raises(RuntimeError, match="enter"):
            sup.status()
    assert len(record.pids()) == 3
    assert not any(map(alive, record.pids()))


async def test_it_cannot_be_entered_twice_at_once() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        with pytest.raises(RuntimeError, match="entered"):
            await sup.__aenter__()
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_entered_in_one_task_used_in_another_and_left_in_a_third() -> None:
    sup = supervisor(m=fake_runner(""))
    await asyncio.create_task(sup.__aenter__())
    assert words(await asyncio.create_task(collect(sup))) == "t1 t2 t3 "
    pid = report(sup).pid
    await asyncio.create_task(_leave(sup))
    assert not alive(pid)


async def _leave(sup: Supervisor) -> None:
    await sup.__aexit__(None, None, None)


async def test_in_an_exit_stack_with_an_error_on_the_way_out() -> None:
    stack = AsyncExitStack()
    sup = await stack.enter_async_context(supervisor(m=fake_runner("")))
    await sup.load("m")
    pid = report(sup).pid
    assert not await stack.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not alive(pid)


async def test_entering_task_may_end_while_it_is_in_use() -> None:
    async with anyio.create_task_group() as tasks:
        sup = supervisor(m=fake_runner(""))

        async def enter() -> None:
            await sup.__aenter__()

        tasks.start_soon(enter)
        await until(lambda: sup._running is not None)
        assert words(await collect(sup)) == "t1 t2 t3 "
        await sup.__aexit__(None, None, None)


async def test_leaving_while_it_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path)

    async def live(gate: Gate) -> None:
        async with supervisor(m=fake_runner(f"record={record.path}; gate@1={gate.path}")) as sup:
            await collect(sup)

    async with Gate() as gate:
        task = asyncio.create_task(live(gate))
        await gate.arrival()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(LIMIT):
                await task
    assert not any(map(alive, record.pids()))


async def test_a_second_cancellation_while_leaving_hurries_it_up(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        working = asyncio.Event()

        async def live() -> None:
            entry = fake_runner(f"record={record.path}; gate@1={gate.path}")
            async with supervisor(m=entry) as sup:
                worker = asyncio.create_task(_ended_somehow(sup))
                await gate.arrival()
                working.set()
            await worker

        task = asyncio.create_task(live())
        await working.wait()
        await anyio.sleep(0.2)
        assert alive(record.pids()[0])  # it drains
        task.cancel()
        with anyio.fail_after(4), pytest.raises(asyncio.CancelledError):
            await task
    assert not any(map(alive, record.pids()))
    await until(lambda: not any("_ended_somehow" in repr(one) for one in asyncio.all_tasks()))


async def _ended_somehow(sup: Supervisor) -> None:
    with pytest.raises(MlxsupError):
        await collect(sup)


async def test_a_crash_of_the_owner_is_loud_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        sup = supervisor(m=fake_runner(f"record={record.path}"), n=fake_runner(f"gate@loading={gate.path}"))
        await sup.__aenter__()
        async with anyio.create_task_group() as tasks:
            await sup.load("m")
            tasks.start_soon(_expect_closed, sup)
            await gate.arrival()
            monkeypatch.setattr(sup._registry()._scheduler, "handle", _crash)
            with pytest.raises(ShuttingDown):
                await sup.load("m")
        with pytest.raises((ExceptionGroup, ZeroDivisionError), match=r"division|unhandled"):
            await sup.__aexit__(None, None, None)
    await until(lambda: not any(map(alive, record.pids())))


def _crash(*_: Any) -> Any:
    return 1 / 0


async def _expect_closed(sup: Supervisor) -> None:
    with pytest.raises(ShuttingDown):
        await sup.load("n")


async def test_events_tell_every_transition_in_order() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        events = sup.events()
        await collect(sup)
        await sup.unload("m")
        found = [await anext(events) for _ in range(4)]
        events.close()
    assert [(event.previous, event.state) for event in found] == [
        ("stopped", "starting"),
        ("starting", "ready"),
        ("ready", "stopping"),
        ("stopping", "stopped"),
    ]
    assert {event.generation for event in found} == {1}


async def test_events_end_with_the_supervisor() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        reading = asyncio.create_task(_states(sup.events()))
        await sup.load("m")
    assert await reading == ["starting", "ready", "stopping", "stopped"]


async def _states(events: Events) -> list[str]:
    return [event.state async for event in events]


async def test_no_descriptors_left_is_a_typed_error_and_passes(tmp_path: Path) -> None:
    record = Record(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with supervisor(m=fake_runner(f"record={record.path}"), n=fake_runner("")) as sup:
        await sup.load("n")  # what is needed once is there
        await sup.unload("n")
        for spare in range(0, 12, 2):
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
            hoard = _hoard(spare)
            try:
                with anyio.fail_after(LIMIT):
                    await sup.load("m")
            except ResourceExhausted as error:
                assert "descriptors" in error.message  # noqa: PT017 - it may or may not fail, by how many are spare
            finally:
                for descriptor in hoard:
                    os.close(descriptor)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: report(sup).state in ("ready", "failed", "backoff", "stopped"))
            await sup.unload("m")
            assert not any(map(alive, record.pids()))
        assert words(await collect(sup)) == "t1 t2 t3 "


def _hoard(spare: int) -> list[int]:
    """Take all descriptors but some."""
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(spare):
            os.close(taken.pop())
    return taken


async def test_many_lives_leave_no_descriptors() -> None:
    sup = Supervisor(settings(m=fake_runner("tokens=1"), n=fake_runner("exit=1")))
    counts = []
    for _ in range(6):
        async with sup:
            await collect(sup)
            with pytest.raises(LoadFailed):
                await sup.load("n")
        await anyio.sleep(0.05)
        counts.append(len(list(Path("/dev/fd").iterdir())))
    assert counts[1] == counts[-1]
