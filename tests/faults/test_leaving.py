"""The client leaves, in every phase: the work stops, its place is freed once, and the next one is served."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from mlxsup import Supervisor
from mlxsup.errors import InvalidRequest, ModelNotFound, QueueFull
from mlxsup.testing import Gate, fake_runner
from tests.waiting import until

from .house import Record, collect, report, state_is, supervisor, words

ADDRESSES = pytest.mark.parametrize("address", ["unix", "tcp"])
AT_ONCE = 1.0
"""The figure is 0.1 s; a busy machine gets more."""


async def aborted(record: Record, number: int = 1) -> float:
    """Wait until the runner noticed that the client of this request has left."""
    return await until(lambda: f"gone {number}" in record.lines(), AT_ONCE)


@ADDRESSES
@pytest.mark.parametrize("phase", ["request", "first", "1"])
@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_leaving_an_answer_aborts_it_in_the_runner(tmp_path: Path, address: Any, phase: str, how: str) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        entry = fake_runner(f"record={record.path}; gate@{phase}#1={gate.path}", address=address)
        async with supervisor(m=entry) as sup:
            chunks = sup.completion("m", prompt="p")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_iterate, chunks)
                arrival = await gate.arrival()
                if phase == "1":
                    await until(lambda: report(sup).leases == 1)
                if how == "closed":
                    await chunks.aclose()
                tasks.cancel_scope.cancel()
            began = time.monotonic()
            with anyio.fail_after(AT_ONCE):
                await arrival.left()
            await aborted(record)
            await until(lambda: report(sup).leases == 0, AT_ONCE)
            assert time.monotonic() - began < AT_ONCE
            assert words(await collect(sup)) == "t1 t2 t3 "
            await until(lambda: report(sup).leases == 0)
            assert len(record.pids()) == 1


async def _iterate(chunks: Any) -> None:
    async for _ in chunks:
        pass


@pytest.mark.parametrize("how", ["break out of the context", "drop the iterator", "raise in the loop"])
async def test_every_way_out_of_the_loop_ends_the_work(tmp_path: Path, how: str) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; hang@1#1")) as sup:
        if how == "break out of the context":
            async with sup.completion("m", prompt="p") as chunks:
                async for _ in chunks:
                    break
        elif how == "drop the iterator":
            async for _ in sup.completion("m", prompt="p"):
                break
            gc.collect()
        else:
            with pytest.raises(ZeroDivisionError):
                await _raise_in_the_middle(sup)
        await aborted(record)
        await until(lambda: report(sup).leases == 0, AT_ONCE)
        await anyio.lowlevel.checkpoint()  # the caller's next await is not cancelled by what it left
        assert words(await collect(sup)) == "t1 t2 t3 "


async def _raise_in_the_middle(sup: Supervisor) -> None:
    async with sup.completion("m", prompt="p") as chunks:
        async for _ in chunks:
            raise ZeroDivisionError


async def test_leaving_the_queue_frees_its_place_and_asks_nothing_of_the_runner(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        entry = fake_runner(f"record={record.path}; gate@1#1={gate.path}", concurrency=1, queue=2)
        async with supervisor(m=entry) as sup, anyio.create_task_group() as tasks:
            tasks.start_soon(collect, sup)
            arrival = await gate.arrival()
            leaving, staying = anyio.CancelScope(), anyio.CancelScope()
            answers: list[str] = []
            tasks.start_soon(_collect_in, leaving, sup, answers)
            tasks.start_soon(_collect_in, staying, sup, answers)
            await until(lambda: report(sup).queue == 2)
            with pytest.raises(QueueFull):
                await collect(sup)
            leaving.cancel()
            assert await until(lambda: report(sup).queue == 1) < AT_ONCE
            arrival.go()
            await until(lambda: answers == ["t1 t2 t3 "])
            assert len(record.lines("request")) == 2
            await until(lambda: report(sup).leases == 0)


async def _collect_in(scope: anyio.CancelScope, sup: Supervisor, answers: list[str]) -> None:
    with scope:
        answers.append(words(await collect(sup)))


async def test_places_are_freed_exactly_once_under_a_storm_of_leaving(tmp_path: Path) -> None:
    """However callers come and go, never more at once than the model allows, and all places free in the end."""
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; delay=0.005; tokens=6", concurrency=3)) as sup:
        await sup.load("m")

        async def caller(number: int) -> None:
            await anyio.sleep(0.002 * (number % 17))
            with anyio.move_on_after(0.003 * (number % 29)):
                await collect(sup)

        async def watch() -> None:
            while True:
                assert report(sup).leases <= 3
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as watching:
            watching.start_soon(watch)
            async with anyio.create_task_group() as tasks:
                for number in range(120):
                    tasks.start_soon(caller, number)
            watching.cancel_scope.cancel()
        await until(lambda: report(sup).leases == 0 and report(sup).queue == 0)
        assert [words(await collect(sup)) for _ in range(3)] == ["t1 t2 t3 t4 t5 t6 "] * 3
        assert len(record.pids()) == 1


async def test_a_deaf_runner_does_not_keep_the_place() -> None:
    """One that never notices that its client left: the next caller is let in all the same."""
    async with supervisor(m=fake_runner("ignore-gone; hang@1#1")) as sup:
        await sup.load("m")
        with anyio.move_on_after(0.3):
            await collect(sup)
        assert await until(lambda: report(sup).leases == 0) < AT_ONCE
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_a_load_that_is_cancelled_goes_on() -> None:
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@loading={gate.path}")) as sup:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sup.load, "m")
            arrival = await gate.arrival()
            tasks.cancel_scope.cancel()
        arrival.go()
        await state_is(sup, "ready")


async def test_an_unload_that_is_cancelled_goes_on(tmp_path: Path) -> None:
    async with supervisor(m=fake_runner("delay@sigterm=0.3")) as sup:
        await sup.load("m")
        with anyio.move_on_after(0.05):
            await sup.unload("m")
        assert report(sup).state == "stopping"
        await state_is(sup, "stopped")


async def test_requests_that_cannot_be_made_leave_no_trace() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        with pytest.raises(ModelNotFound):
            sup.completion("nobody", prompt="p")
        with pytest.raises(InvalidRequest):
            sup.completion("m", prompt="p", seed=-1)
        with pytest.raises(InvalidRequest):
            sup.completion("m", prompt="p", colour="red")
        gc.collect()
        assert report(sup).state == "stopped"


async def test_a_completion_that_is_never_used_starts_nothing() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        async with sup.completion("m", prompt="p"):
            pass
        sup.completion("m", prompt="p")
        await anyio.sleep(0.05)
        assert report(sup).state == "stopped"


async def test_a_completion_that_has_ended_stays_ended() -> None:
    async with supervisor(m=fake_runner("")) as sup:
        completion = sup.completion("m", prompt="p")
        assert len([chunk async for chunk in completion]) == 4
        assert [chunk async for chunk in completion] == []
        await completion.aclose()
        await completion.aclose()
        await until(lambda: report(sup).leases == 0)
