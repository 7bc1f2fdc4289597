"""Work, questions and events as a program that imports Supervisor sees them: one model, any use and misuse of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import CompletionRequest, MlxsupError, Options, Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.errors import InvalidRequest, ModelNotFound
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .faults import house
from .faults.house import alive, collect, report


def supervisor(scenario: str = "", **keys: Any) -> Supervisor:
    """A supervisor of one model, `m`."""
    return house.supervisor(m=fake_runner(scenario, **keys))


async def words(sup: Supervisor, **fields: Any) -> str:
    return house.words(await collect(sup, **fields))


class TestDropping:
    """A completion that is not read to its end."""

    async def test_after_break_its_place_is_free(self) -> None:
        async with Gate() as gate, supervisor(f"gate@2#1={gate.path}") as sup:
            async for _ in sup.completion("m", prompt="p"):
                break
            with anyio.fail_after(LIMIT):
                assert await words(sup) == "t1 t2 t3 "

    async def test_leaving_its_context_frees_it_at_once(self) -> None:
        async with Gate() as gate, supervisor(f"gate@1={gate.path}") as sup:
            async with sup.completion("m", prompt="p") as chunks:
                await anext(chunks)
                assert report(sup).leases == 1
            assert report(sup).leases == 0

    async def test_its_end_frees_it_at_once(self) -> None:
        async with supervisor() as sup:
            async for _ in sup.completion("m", prompt="p"):
                assert report(sup).leases <= 1
            assert report(sup).leases == 0

    async def test_one_that_never_began_costs_nothing(self) -> None:
        async with supervisor() as sup:
            sup.completion("m", prompt="p")
            async with sup.completion("m", prompt="p"):
                pass
            assert report(sup).state == "stopped"

    async def test_one_that_outlives_its_supervisor_is_harmless(self) -> None:
        async with Gate() as gate:
            sup = await supervisor(f"gate@1={gate.path}", drain_timeout="0s").__aenter__()
            completion = sup.completion("m", prompt="p")
            await anext(completion)
            await sup.__aexit__(None, None, None)
            with pytest.raises(MlxsupError):
                await anext(completion)
            await completion.aclose()
            await completion.aclose()
            del completion
            gc.collect()

    async def test_a_cancelled_reader_frees_it(self) -> None:
        async with Gate() as gate, supervisor(f"gate@1#1={gate.path}") as sup:
            reading = asyncio.create_task(words(sup))
            await gate.arrival()
            reading.cancel()
            await asyncio.wait({reading})
            with anyio.fail_after(LIMIT):
                assert await words(sup) == "t1 t2 t3 "

    @pytest.mark.parametrize("before", ["answer", "chunk"])
    async def test_one_that_another_threads_garbage_collection_finds(self, before: str) -> None:
        """It is part of a cycle, as an exception that holds its frame makes it."""
        async with Gate() as gate, supervisor(f"gate@1#1={gate.path}", concurrency=1) as sup:
            loop = asyncio.get_running_loop()

            async def begin() -> None:
                completion: Any = sup.completion("m", prompt="p")
                completion.itself = completion
                await completion.start()
                if before == "chunk":
                    await anext(completion)

            gc.collect()
            gc.disable()
            loop.set_debug(True)  # it finds out who uses a loop from the wrong thread
            try:
                await begin()
                second = asyncio.create_task(words(sup))
                await until(lambda: report(sup).queue == 1)
                await asyncio.to_thread(gc.collect)
                with anyio.fail_after(LIMIT):
                    assert await second == "t1 t2 t3 "
            finally:
                loop.set_debug(False)
                gc.enable()

    async def test_closed_by_another_task_while_it_waits_for_its_place(self) -> None:
        async with Gate() as gate, supervisor(f"gate@1#1={gate.path}", concurrency=1) as sup:
            first = asyncio.create_task(words(sup))
            arrival = await gate.arrival()
            completion = sup.completion("m", prompt="p")
            waiting = asyncio.create_task(anext(completion, None))
            await until(lambda: report(sup).queue == 1)
            await completion.aclose()
            arrival.go()
            with anyio.fail_after(LIMIT):
                assert await first == "t1 t2 t3 "
                assert await waiting is None
            assert report(sup).leases == 0

    async def test_after_its_end_there_is_nothing_more(self) -> None:
        async with supervisor() as sup:
            completion = sup.completion("m", prompt="p")
            assert len([chunk async for chunk in completion]) == 4
            assert [chunk async for chunk in completion] == []


class TestEvents:
    async def test_they_tell_the_whole_life_and_end_with_it(self) -> None:
        sup = supervisor()
        async with sup:
            events = sup.events()
            await sup.load("m")
            pid = report(sup).pid
            await sup.unload("m")
        told = [event async for event in events]
        assert [(event.previous, event.state) for event in told] == [
            ("stopped", "starting"),
            ("starting", "ready"),
            ("ready", "stopping"),
            ("stopping", "stopped"),
        ]
        assert {event.generation for event in told} == {1}
        assert told[1].pid == pid
        assert all(event.reason for event in told)
        assert [event async for event in events] == []

    async def test_closing_ends_them(self) -> None:
        async with supervisor() as sup:
            events = sup.events()
            waiting = asyncio.create_task(anext(events, None))
            await asyncio.sleep(0)
            events.close()
            with anyio.fail_after(LIMIT):
                assert await waiting is None

    async def test_each_listener_gets_all(self) -> None:
        async with supervisor() as sup:
            one, other = sup.events(), sup.events()
            await sup.load("m")
        assert [event.state async for event in one] == [event.state async for event in other]

    async def test_after_the_drain_there_are_none(self) -> None:
        async with supervisor() as sup:
            await sup.drain()
            with anyio.fail_after(LIMIT):
                assert [event async for event in sup.events()] == []

    async def test_a_listener_that_is_dropped_is_forgotten(self) -> None:
        async with supervisor() as sup:
            before = len(sup._registry()._subscribers)
            for _ in range(10):
                sup.events()
            gc.collect()
            assert len(sup._registry()._subscribers) == before


class TestRequests:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"prompt": 5},
            {"prompt": None},
            {"prompt": "p", "width": "64"},
            {"prompt": "p", "width": 64.5},
            {"prompt": "p", "steps": True},
            {"prompt": "p", "guidance": "high"},
            {"prompt": "p", "guidance": float("nan")},
            {"prompt": "p", "guidance": float("inf")},
            {"prompt": "p", "seed": "7"},
            {"prompt": "p", "seed": -1},
            {"prompt": "p", "seed": 2**53},
            {"prompt": "p", "images": b"one picture, not a list of them"},
            {"prompt": "p", "images": "text"},
            {"prompt": "p", "images": [5]},
            {"prompt": "p", "images": ["text"]},
            {"prompt": "p", "images": 5},
            {"prompt": "p", "options": {"top_q": 1}},
            {"prompt": "p", "options": {"top_k": "x"}},
            {"prompt": "p", "size": 64},
            {"prompt": "lone surrogate \ud800"},
        ],
        ids=lambda fields: ascii(fields)[:40],
    )
    async def test_what_is_none_is_refused_before_anything_happens(self, fields: dict[str, Any]) -> None:
        async with supervisor() as sup:
            with pytest.raises(InvalidRequest):
                sup.completion("m", **fields)
            gc.collect()
            assert report(sup).state == "stopped"

    async def test_a_request_or_its_fields_but_not_both(self) -> None:
        async with supervisor() as sup:
            with pytest.raises(InvalidRequest, match="not both: steps"):
                sup.completion("m", CompletionRequest(prompt="p"), steps=3)

    async def test_both_ways_are_the_same(self) -> None:
        async with supervisor() as sup:
            fields: dict[str, Any] = {"prompt": "p", "seed": 3, "images": [b"x"], "options": {"top_k": 2}}
            by_fields = sup.completion("m", **fields).request
            request = CompletionRequest(prompt="p", seed=3, images=[b"x"], options=Options(top_k=2))
            assert by_fields == sup.completion("m", request).request

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_pictures_are_bytes_of_any_kind(self, kind: Any) -> None:
        async with supervisor() as sup:
            for images in ([kind(b"x")], (kind(b"x"),)):
                assert sup.completion("m", prompt="p", images=images).request.images == [b"x"]
            assert sup.completion("m", prompt="p", images=[]).request.images == []

    @pytest.mark.parametrize("seed", [None, 0])
    async def test_a_seed_is_chosen_and_reported(self, seed: int | None) -> None:
        async with supervisor() as sup, sup.completion("m", prompt="p", seed=seed) as chunks:
            *_, last = [chunk async for chunk in chunks]
            assert 0 < (last.seed or 0) < 2**53
            assert last.seed == chunks.request.seed

    async def test_a_seed_that_is_given_is_kept(self) -> None:
        async with supervisor() as sup, sup.completion("m", prompt="p", seed=7) as chunks:
            assert [chunk async for chunk in chunks][-1].seed == 7

    async def test_a_model_nobody_knows(self) -> None:
        async with supervisor(aliases=["other"]) as sup:
            with pytest.raises(ModelNotFound, match="did you mean other"):
                sup.completion("othr", prompt="p")
            for work in (sup.load("x"), sup.unload("x")):
                with pytest.raises(ModelNotFound):
                    await work
            for call in (sup.report, sup.logs):
                with pytest.raises(ModelNotFound):
                    call("x")
            with pytest.raises(ModelNotFound):
                async with sup.lease("x"):
                    pass

    async def test_an_alias_is_the_model(self) -> None:
        async with supervisor(aliases=["other"]) as sup:
            await sup.load("other")
            assert sup.report("other") == sup.report("m")
            assert sup.report("m").state == "ready"


def stays(sup: Supervisor, model: str = "m") -> float | None:
    """Seconds from its last use to the end of a ready model, None for never."""
    found = report(sup, model)
    assert (found.state, found.leases) == ("ready", 0)
    assert found.last_used is not None
    return None if found.expires is None else found.expires - found.last_used


class TestKeepAlive:
    """How long a model stays after its last use: as a request says, else as the model has it, else as all have it."""

    async def test_a_request_wins_over_the_model_and_the_model_over_all(self) -> None:
        models = {"one": fake_runner(keep_alive="20m"), "other": fake_runner()}
        async with Supervisor(parse({"scheduler": {"keep_alive": "10m"}, "models": models}, KEYS)) as sup:
            for model, own in (("one", 1200), ("other", 600)):
                await collect(sup, model)
                assert stays(sup, model) == pytest.approx(own, abs=1)
                await collect(sup, model, keep_alive="30m")
                assert stays(sup, model) == pytest.approx(1800, abs=1)

    @pytest.mark.parametrize(("told", "seconds"), [(90, 90), ("90", 90), ("5m", 300), (-1, None), ("-1s", None)])
    @pytest.mark.parametrize("way", house.WAYS)
    async def test_each_way_of_asking_takes_seconds_or_text(
        self, way: str, told: float | str, seconds: float | None
    ) -> None:
        async with supervisor() as sup:
            for _ in range(2):  # one that loads it, one that finds it loaded
                await house.use(sup, way, keep_alive=told)
                assert stays(sup) == (seconds if seconds is None else pytest.approx(seconds, abs=1))

    @pytest.mark.parametrize("way", house.WAYS)
    async def test_0_is_at_once(self, way: str) -> None:
        async with supervisor() as sup:
            await house.use(sup, way, keep_alive=0)
            await until(lambda: report(sup).state == "stopped")
            await house.use(sup, way, keep_alive="0s")
            await until(lambda: report(sup).state == "stopped")
            assert report(sup).exits == 2

    async def test_the_last_one_that_said_it_holds_until_the_model_is_unloaded(self) -> None:
        async with supervisor(keep_alive="10m") as sup:
            await words(sup, keep_alive=-1)
            await words(sup, keep_alive="20m")
            await words(sup)
            assert stays(sup) == pytest.approx(1200, abs=1)
            await sup.unload("m")
            await words(sup)
            assert stays(sup) == pytest.approx(600, abs=1)

    async def test_a_death_ends_it_too(self) -> None:
        async with supervisor(keep_alive="10m") as sup:
            await words(sup, keep_alive=-1)
            os.kill(report(sup).pid, signal.SIGKILL)
            await until(lambda: report(sup).pid == -1)
            await words(sup)
            assert stays(sup) == pytest.approx(600, abs=1)

    async def test_one_that_never_got_its_turn_has_said_nothing(self) -> None:
        async with supervisor(keep_alive="10m") as sup:
            async with sup.lease("m"):
                waiting = asyncio.create_task(words(sup, keep_alive=-1))
                await until(lambda: report(sup).queue == 1)
                waiting.cancel()
                await asyncio.wait({waiting})
            assert stays(sup) == pytest.approx(600, abs=1)

    async def test_0_keeps_it_for_those_who_wait(self) -> None:
        async with Gate() as gate, supervisor(f"gate@1#1={gate.path}") as sup:
            first = asyncio.create_task(words(sup, keep_alive=0))
            arrival = await gate.arrival()
            second = asyncio.create_task(words(sup))
            await until(lambda: report(sup).queue == 1)
            arrival.go()
            assert await first == await second == "t1 t2 t3 "
            await until(lambda: report(sup).state == "stopped")
            assert report(sup).exits == 1

    async def test_a_pinned_model_stays_whatever_is_said(self) -> None:
        async with supervisor(pinned=True) as sup:
            await words(sup, keep_alive=0)
            assert stays(sup) is None

    async def test_a_very_long_time_is_no_error(self) -> None:
        async with supervisor() as sup:
            assert await words(sup, keep_alive=1e300, deadline=1e300) == "t1 t2 t3 "
            assert stays(sup)

    @pytest.mark.parametrize("told", ["soon", "5 parsecs", float("nan"), True, [1]])
    async def test_what_is_none_is_refused_by_its_name(self, told: Any) -> None:
        async with supervisor() as sup:
            for way in house.WAYS:
                with pytest.raises(InvalidRequest, match=r"^keep_alive: .*duration") as caught:
                    await house.use(sup, way, keep_alive=told)
                assert caught.value.details["param"] == "keep_alive"
            gc.collect()
            assert report(sup).state == "stopped"


class TestStatus:
    async def test_right_after_each_step(self) -> None:
        async with supervisor() as sup:
            assert [each.state for each in sup.status().runners] == ["stopped"]
            await sup.load("m")
            ready = report(sup)
            assert (ready.state, ready.leases, ready.queue) == ("ready", 0, 0)
            assert alive(ready.pid)
            async with sup.lease("m") as lease:
                assert report(sup).leases == 1
                assert lease.model == "m"
            assert report(sup).leases == 0
            await sup.unload("m")
            gone = report(sup)
            assert (gone.state, gone.pid, gone.exits) == ("stopped", -1, 1)
            assert not alive(ready.pid)

    async def test_right_after_a_death_that_a_caller_has_seen(self, tmp_path: Path) -> None:
        async with supervisor(f"once={tmp_path / 'once'}; crash@1") as sup:
            with pytest.raises(MlxsupError):
                await words(sup)
            assert report(sup).state != "ready"
            with anyio.fail_after(LIMIT):
                assert await words(sup) == "t1 t2 t3 "

    async def test_while_a_load_is_under_way(self) -> None:
        async with Gate() as gate, supervisor(f"gate@loading={gate.path}") as sup:
            loading = asyncio.create_task(sup.load("m"))
            arrival = await gate.arrival()
            assert (report(sup).state, report(sup).queue) == ("starting", 1)
            await until(lambda: report(sup).pid > 0)  # it may be at the gate before we know that it was born
            assert alive(report(sup).pid)
            arrival.go()
            await loading

    async def test_logs_are_those_of_the_last_process(self) -> None:
        async with supervisor("stderr=hello") as sup:
            assert sup.logs("m") == []
            await sup.load("m")
            os.kill(report(sup).pid, signal.SIGKILL)
            await until(lambda: report(sup).pid == -1)
            assert sup.logs("m") == ["hello"]
