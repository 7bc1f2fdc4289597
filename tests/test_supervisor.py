"""The life of a Supervisor as a program that imports it sees it: entering, leaving, and everything that goes wrong between."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from mlxsup import CompletionRequest, MlxsupError, Options, Supervisor
from mlxsup.config import Settings, parse
from mlxsup.engines import KEYS
from mlxsup.errors import InvalidRequest, ModelNotFound, ShuttingDown
from mlxsup.registry import Registry
from mlxsup.report import RunnerReport
from mlxsup.scheduling.scheduler import Scheduler
from mlxsup.testing import Gate, fake_runner

LIMIT = 10.0
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def settings(scenario: str = "", **keys: Any) -> Settings:
    return parse({"models": {"m": fake_runner(scenario, **{"stop_grace": "2s", **keys})}}, KEYS)


def supervisor(scenario: str = "", **keys: Any) -> Supervisor:
    return Supervisor(settings(scenario, **keys))


def report(sup: Supervisor) -> RunnerReport:
    return sup.report("m")


async def words(sup: Supervisor, **fields: Any) -> str:
    async with sup.completion("m", **{"prompt": "p", **fields}) as chunks:
        return "".join([chunk.content async for chunk in chunks])


async def until(true: Any) -> None:
    with anyio.fail_after(LIMIT):
        while not true():
            await anyio.sleep(0.002)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class TestEntering:
    async def test_in_one_task_and_leaving_in_another(self) -> None:
        """As fixtures, exit stacks and cleanup contexts of web servers do."""
        sup = supervisor()
        await asyncio.create_task(sup.__aenter__())
        assert await asyncio.create_task(words(sup)) == "t1 t2 t3 "
        pid = report(sup).pid
        await asyncio.create_task(sup.__aexit__(None, None, None))
        assert not alive(pid)

    async def test_twice_in_a_row(self) -> None:
        sup = supervisor()
        pids = set()
        for _ in range(2):
            async with sup:
                assert await words(sup) == "t1 t2 t3 "
                assert report(sup).exits == 0
                pids.add(report(sup).pid)
        assert len(pids) == 2
        assert not any(alive(pid) for pid in pids)

    async def test_two_in_one_program(self) -> None:
        async with supervisor() as one, supervisor() as other:
            assert await asyncio.gather(words(one), words(other)) == ["t1 t2 t3 "] * 2
            assert report(one).pid != report(other).pid
            await one.unload("m")
            assert alive(report(other).pid)
        assert one.settings.models.keys() == other.settings.models.keys()

    async def test_again_before_it_was_left(self) -> None:
        async with supervisor() as sup:
            with pytest.raises(RuntimeError, match="entered already"):
                await sup.__aenter__()
            assert await words(sup)

    async def test_by_two_at_once(self) -> None:
        sup = supervisor()
        found = await asyncio.gather(sup.__aenter__(), sup.__aenter__(), return_exceptions=True)
        await sup.__aexit__(None, None, None)
        assert sorted(type(each).__name__ for each in found) == ["RuntimeError", "Supervisor"]

    @pytest.mark.parametrize("turns", range(6))
    async def test_a_cancellation_while_it_is_entered_leaves_nothing(self, turns: int) -> None:
        sup = supervisor()
        entering = asyncio.create_task(sup.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        entering.cancel()
        await asyncio.wait({entering})
        if not entering.cancelled():
            await sup.__aexit__(None, None, None)
        async with sup:
            assert report(sup).state == "stopped"

    async def test_what_keeps_it_from_starting_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(registry: Registry, started: asyncio.Event) -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError("a bug")

        sup = supervisor()
        with monkeypatch.context() as broken:
            broken.setattr(Registry, "run", fail)
            with anyio.fail_after(LIMIT), pytest.raises(ZeroDivisionError):
                await sup.__aenter__()
        async with sup:
            assert await words(sup)

    async def test_it_starts_no_process(self) -> None:
        async with supervisor() as sup:
            assert psutil.Process().children() == []
            assert (report(sup).state, report(sup).pid) == ("stopped", -1)

    async def test_everything_before_it_is_a_mistake_that_says_so(self) -> None:
        sup = supervisor()
        for call in (sup.status, sup.events, lambda: sup.report("m"), lambda: sup.logs("m")):
            with pytest.raises(RuntimeError, match="async with Supervisor"):
                call()
        with pytest.raises(RuntimeError, match="async with Supervisor"):
            sup.completion("m", prompt="p")
        for work in (sup.load("m"), sup.unload("m"), sup.drain()):
            with pytest.raises(RuntimeError, match="async with Supervisor"):
                await work
        with pytest.raises(RuntimeError, match="async with Supervisor"):
            async with sup.lease("m"):
                pass

    async def test_everything_after_it_too(self) -> None:
        async with supervisor() as sup:
            completion = sup.completion("m", prompt="p")
        with pytest.raises(RuntimeError, match="async with Supervisor"):
            sup.status()
        with pytest.raises(ShuttingDown):
            await completion.start()

    async def test_without_a_configuration_it_knows_emoji(self) -> None:
        async with Supervisor() as sup:
            assert [each.model for each in sup.status().runners] == ["emoji"]


class TestLeaving:
    async def test_nothing_is_left(self) -> None:
        async with supervisor("fork=setsid+ignore; ignore=SIGTERM", stop_grace="100ms") as sup:
            await sup.load("m")
            children = psutil.Process().children(recursive=True)
        assert children
        assert not [child for child in children if alive(child.pid)]

    async def test_work_in_flight_ends_first(self) -> None:
        async with Gate() as gate:
            sup = await supervisor(f"gate@1={gate.path}").__aenter__()
            working = asyncio.create_task(words(sup))
            arrival = await gate.arrival()
            leaving = asyncio.create_task(sup.__aexit__(None, None, None))
            await until(lambda: sup.status().closing)
            with pytest.raises(ShuttingDown):
                await words(sup)
            arrival.go()
            assert await working == "t1 t2 t3 "
            await leaving

    @pytest.mark.parametrize("how", ["task", "scope"])
    async def test_a_cancellation_forces_the_rest_and_is_passed_on(
        self, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        shut_down = Registry.shut_down

        def counting(registry: Registry, *, force: bool) -> None:
            asked.append(force)
            shut_down(registry, force=force)

        monkeypatch.setattr(Registry, "shut_down", counting)
        async with Gate() as gate:
            sup = await supervisor(f"gate@1={gate.path}", drain_timeout="1h").__aenter__()
            working = asyncio.create_task(words(sup))
            await gate.arrival()
            pid = report(sup).pid
            scope = anyio.CancelScope()

            async def leave() -> None:
                with scope:
                    await sup.__aexit__(None, None, None)

            leaving = asyncio.create_task(leave())
            await until(lambda: report(sup).state == "draining")
            if how == "task":
                leaving.cancel()
            else:
                scope.cancel()
            with anyio.fail_after(LIMIT):
                await asyncio.wait({leaving})
                with pytest.raises(MlxsupError):
                    await working
        assert leaving.cancelled() or scope.cancelled_caught
        assert not alive(pid)
        assert len(asked) <= 3, "it asks again and again while it waits"

    async def test_an_error_in_the_body_comes_through(self) -> None:
        with pytest.raises(ZeroDivisionError):
            async with supervisor() as sup:
                await sup.load("m")
                1 / 0  # noqa: B018

    async def test_draining_comes_before_leaving(self) -> None:
        async with supervisor() as sup:
            await sup.load("m")
            await sup.drain()
            assert sup.status().closing
            assert report(sup).state == "stopped"
            for work in (sup.load("m"), words(sup)):
                with pytest.raises(ShuttingDown):
                    await work
            await sup.drain()


CRASH = """
import asyncio, sys
from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import fake_runner

async def main():
    sup = await Supervisor(parse({"models": {"m": fake_runner("fork=print; fork=setsid")}}, KEYS)).__aenter__()
    await sup.load("m")
    print(sup.report("m").pid, flush=True)

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@LOOPS
def test_a_program_that_forgets_to_leave_ends_and_leaves_nothing(loop: str) -> None:
    """Its loop cancels every task at once, the supervisor's own too."""
    done = subprocess.run([sys.executable, "-c", CRASH, loop], capture_output=True, text=True, timeout=15, check=False)
    pid = int(done.stdout)
    assert not alive(pid)
    assert not [each for each in psutil.pids() if _is_of_group(each, pid) and alive(each)]


def _is_of_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


class TestCrash:
    """The owner task fails, which no test of ours should ever see; whoever does must hear of it."""

    async def crash(self, sup: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(scheduler: Scheduler, event: object, now: float) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(Scheduler, "handle", fail)
        with pytest.raises(MlxsupError):
            await sup.unload("m")

    async def test_it_is_loud(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with Gate() as gate:
            sup = await supervisor(f"gate@loading={gate.path}").__aenter__()
            waiting = [asyncio.create_task(sup.load("m")), asyncio.create_task(words(sup))]
            await gate.arrival()
            pid = report(sup).pid
            with anyio.fail_after(LIMIT):
                await self.crash(sup, monkeypatch)
                for waiter in waiting:
                    with pytest.raises(MlxsupError):
                        await waiter
                with pytest.raises(BaseException) as caught:  # noqa: PT011 - the group and the bug in it
                    await sup.__aexit__(None, None, None)
        assert _is_in(ZeroDivisionError, caught.value)
        assert not alive(pid)

    async def test_it_can_be_entered_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sup = await supervisor().__aenter__()
        with monkeypatch.context() as broken:
            await self.crash(sup, broken)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - as above
            await sup.__aexit__(None, None, None)
        async with sup:
            assert await words(sup) == "t1 t2 t3 "

    async def test_its_listeners_hear_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sup = await supervisor().__aenter__()
        events = sup.events()
        await self.crash(sup, monkeypatch)
        with anyio.fail_after(LIMIT):
            assert [event async for event in events] == []
            assert [event async for event in sup.events()] == []
        with pytest.raises(BaseException):  # noqa: B017, PT011 - as above
            await sup.__aexit__(None, None, None)


def _is_in(kind: type[BaseException], error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is_in(kind, each) for each in error.exceptions)
    return isinstance(error, kind)


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
