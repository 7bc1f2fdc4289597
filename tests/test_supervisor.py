"""The life of a Supervisor as a program that imports it sees it: entering, leaving, and everything that goes wrong between."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from mlxsup import MlxsupError, Supervisor
from mlxsup.config import Settings, parse
from mlxsup.engines import KEYS
from mlxsup.errors import ShuttingDown
from mlxsup.registry import Registry
from mlxsup.report import RunnerReport
from mlxsup.scheduling.scheduler import Scheduler
from mlxsup.testing import Gate, fake_runner
from tests.waiting import until

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


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class TestEntering:
    async def test_runners_work_in_the_folder_of_their_configuration(self, tmp_path: Path) -> None:
        own = parse({"models": {"m": fake_runner()}}, KEYS, folder=str(tmp_path))
        async with Supervisor(own) as sup:
            await sup.load("m")
            assert psutil.Process(report(sup).pid).cwd() == str(tmp_path.resolve())

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
            assert [*await asyncio.gather(words(one), words(other))] == ["t1 t2 t3 "] * 2
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
    done = subprocess.run([sys.executable, "-c", CRASH, loop], capture_output=True, text=True, timeout=15, check=False)
    pid = int(done.stdout)
    assert not alive(pid)
    assert not [each for each in psutil.pids() if _is_of_group(each, pid) and alive(each)]


@pytest.mark.parametrize("state", ["loading", "ready"])
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
async def test_the_end_of_the_loop_may_cancel_its_tasks_in_any_order(state: str, first: int, backwards: bool) -> None:
    """All at once, as asyncio.run does when its program has ended, which has no order in it."""
    before = asyncio.all_tasks()
    async with Gate() as gate:
        sup = await supervisor(f"gate@loading={gate.path}").__aenter__()
        loading = asyncio.create_task(sup.load("m"), name="mlxsup caller")
        arrival = await gate.arrival()
        if state == "ready":
            arrival.go()
            await loading
        await until(lambda: report(sup).pid > 0)  # its program may run before its spawn is noted
        pid = report(sup).pid
        tasks = sorted(
            (task for task in asyncio.all_tasks() - before if task.get_name().startswith("mlxsup")),
            key=asyncio.Task.get_name,
            reverse=backwards,
        )
        for task in tasks[first:] + tasks[:first]:
            task.cancel()
        with anyio.fail_after(5):
            await asyncio.wait(tasks)
        assert not alive(pid)
        await sup.__aexit__(None, None, None)


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
            await until(lambda: report(sup).pid > 0)  # its program may run before its spawn is noted
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
