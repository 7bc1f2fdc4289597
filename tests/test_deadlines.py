"""Each phase of what a program asks for has its limit; the error says which one it was, and the place is free afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import DeadlineExceeded, InvalidRequest, LoadTimeout, Stalled
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT

from . import crowding
from .faults import house
from .faults.house import report

pytestmark = pytest.mark.anyio
every_way = pytest.mark.parametrize("way", house.WAYS)


def supervisor(scenario: str = "", **keys: Any) -> Supervisor:
    """A supervisor of one model, `m`."""
    return house.supervisor(m=fake_runner(scenario, **keys))


async def words(sup: Supervisor, **fields: Any) -> str:
    return house.words(await house.collect(sup, **fields))


@asynccontextmanager
async def crowded(**keys: Any) -> AsyncIterator[Supervisor]:
    """A supervisor whose model `m` finds no room as long as this is not left: `other` is in use."""
    models = {"m": crowding.gib(**keys), "other": crowding.gib()}
    async with Supervisor(crowding.settings("1.5GiB", **models)) as sup:
        async with sup.lease("other"):
            yield sup
        await is_free(sup)


async def is_free(sup: Supervisor) -> None:
    """Nobody has a place or waits for one any more, and the next request is answered."""
    assert (report(sup).leases, report(sup).queue) == (0, 0)
    with anyio.fail_after(LIMIT):
        assert await words(sup) == "t1 t2 t3 "


async def test_queue() -> None:
    async with supervisor(queue_timeout="3s") as sup:
        async with sup.lease("m"):
            with pytest.raises(
                DeadlineExceeded, match=r"^m had no free place within its queue_timeout of 3 s$"
            ) as caught:
                await words(sup)
            assert caught.value.details == {"model": "m", "stage": "queue", "limit": 3.0}
            assert (report(sup).queue, report(sup).leases) == (0, 1)
        await is_free(sup)


@every_way
async def test_queue_for_memory(way: str) -> None:
    async with crowded(queue_timeout="3s") as sup:
        with pytest.raises(DeadlineExceeded, match=r"^m had no free place within its queue_timeout of 3 s$") as caught:
            await house.use(sup, way, deadline="10m")
        assert caught.value.details == {"model": "m", "stage": "queue", "limit": 3.0}
        assert report(sup).queue == 0


@every_way
async def test_queue_while_it_is_loaded(way: str) -> None:
    async with Gate() as gate, supervisor(f"gate@loading={gate.path}", queue_timeout="3s") as sup:
        waiting = asyncio.create_task(house.use(sup, way, deadline="10m"))
        arrival = await gate.arrival()
        with pytest.raises(DeadlineExceeded, match=r"^m was not loaded within its queue_timeout of 3 s$") as caught:
            await waiting
        assert caught.value.details["stage"] == "loading"
        assert report(sup).queue == 0
        arrival.go()
        await is_free(sup)


async def test_load(tmp_path: Path) -> None:
    async with supervisor(f"once={tmp_path / 'once'}; hang@loading", load_timeout="500ms") as sup:
        with pytest.raises(LoadTimeout, match=r"^m made no progress for 0\.5 s") as caught:
            await words(sup)
        assert caught.value.details["stage"] == "loading"
        await is_free(sup)


@pytest.mark.parametrize(
    ("scenario", "stage", "words_of_it"),
    [("hang@request#1", "first_chunk", r"0\.3 s$"), ("hang@1#1", "silence", r"sent nothing more for 0\.3 s$")],
)
async def test_first_chunk_and_silence(scenario: str, stage: str, words_of_it: str) -> None:
    async with supervisor(scenario, **{f"{stage}_timeout": "300ms"}) as sup:
        with pytest.raises(Stalled, match=words_of_it) as caught:
            await words(sup)
        assert (caught.value.details["stage"], caught.value.details["limit"]) == (stage, 0.3)
        await is_free(sup)


async def test_total_in_the_queue() -> None:
    async with supervisor() as sup:
        async with sup.lease("m"):
            with pytest.raises(DeadlineExceeded, match=r"of 0\.2 s has passed while it waited for its turn$") as caught:
                await words(sup, deadline=0.2)
            assert caught.value.details == {"model": "m", "stage": "queue", "limit": 0.2}
            assert (report(sup).queue, report(sup).leases) == (0, 1)
        await is_free(sup)


@every_way
async def test_total_in_the_queue_for_memory(way: str) -> None:
    async with crowded() as sup:
        with pytest.raises(DeadlineExceeded, match=r"of 0\.3 s has passed while it waited for its turn$") as caught:
            await house.use(sup, way, deadline="300ms")
        assert caught.value.details == {"model": "m", "stage": "queue", "limit": 0.3}
        assert report(sup).queue == 0


@every_way
async def test_total_while_it_is_loaded(way: str) -> None:
    async with Gate() as gate, supervisor(f"gate@loading={gate.path}") as sup:
        loading = asyncio.create_task(sup.load("m"))
        arrival = await gate.arrival()
        with pytest.raises(DeadlineExceeded, match=r"while its model was being loaded$") as caught:
            await house.use(sup, way, deadline="200ms")
        assert caught.value.details["stage"] == "loading"
        assert report(sup).queue == 1
        arrival.go()
        await loading
        await is_free(sup)


async def test_total_before_the_first_chunk() -> None:
    async with Gate() as gate, supervisor(f"gate@request#1={gate.path}") as sup:
        await sup.load("m")
        completion = sup.completion("m", prompt="p", deadline="1s")
        with pytest.raises(DeadlineExceeded, match=r"before the first piece of its answer$") as caught:
            await anext(completion)
        assert caught.value.details["stage"] == "first_chunk"
        with anyio.fail_after(LIMIT):
            await (await gate.arrival()).left()
        await is_free(sup)


@pytest.mark.parametrize("way", ["chunks", "bytes"])
async def test_total_in_the_middle_of_an_answer(way: str) -> None:
    async with Gate() as gate, supervisor(f"gate@1#1={gate.path}") as sup:
        await sup.load("m")
        completion = sup.completion("m", prompt="p", deadline="2s")
        step = completion.next_bytes if way == "bytes" else completion.__anext__
        assert await step()
        with pytest.raises(DeadlineExceeded, match=r"of 2 s has passed in the middle of its answer$") as caught:
            await step()
        assert caught.value.details["stage"] == "answer"
        with anyio.fail_after(LIMIT):
            await (await gate.arrival()).left()
        await is_free(sup)


@every_way
async def test_one_that_is_kept_changes_nothing(way: str) -> None:
    async with supervisor() as sup:
        await house.use(sup, way, deadline="1h")
        await is_free(sup)


async def test_that_of_a_lease_bounds_the_wait_and_not_its_use() -> None:
    async with supervisor() as sup:
        await sup.load("m")
        async with sup.lease("m", deadline="500ms"):
            await asyncio.sleep(0.7)
            assert report(sup).leases == 1
        await is_free(sup)


@pytest.mark.parametrize("told", [0, -1, "0s", "soon", float("nan"), True])
@every_way
async def test_what_is_none_is_refused_by_its_name(way: str, told: Any) -> None:
    async with supervisor() as sup:
        with pytest.raises(InvalidRequest, match=r"^deadline: ") as caught:
            await house.use(sup, way, deadline=told)
        assert caught.value.details["param"] == "deadline"
        assert report(sup).state == "stopped"
