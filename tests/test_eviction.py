"""Real processes on a device too small for all of them: who needs the room gets it, and nobody in use is put out."""

from __future__ import annotations

import asyncio
import functools
import json
import os

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import Backoff, ConfigError, Conflict, DoesNotFit, LoadFailed, ModelNotFound, Unloaded
from mlxsup.learnt import LEARNT_FILE
from mlxsup.statefiles import state_directory
from mlxsup.testing import EventRecorder
from tests import waiting

from .crowding import gib, settings, two_hundred_requests

pytestmark = pytest.mark.anyio
LIMIT = 15.0
until = functools.partial(waiting.until, limit=LIMIT)


def state(sup: Supervisor, model: str) -> str:
    return sup.report(model).state


def loaded(sup: Supervisor) -> list[str]:
    return [report.model for report in sup.status().runners if report.state == "ready"]


async def words(sup: Supervisor, model: str) -> str:
    async with sup.completion(model, prompt="p") as chunks:
        return "".join([chunk.content async for chunk in chunks])


class TestRoom:
    @pytest.mark.timeout(90)
    async def test_two_hundred_requests_for_ten_models_where_three_fit(self) -> None:
        """All are answered in the order in which they came; three are there at times and never more; none goes in use."""
        models = {f"m{number}": gib("tokens=1") for number in range(10)}
        async with Supervisor(settings(**models)) as sup:
            assert await two_hundred_requests(sup, [*models]) == []

    async def test_the_one_that_is_used_stays_and_the_idle_one_goes(self) -> None:
        models = {"a": gib(), "b": gib(), "c": gib(), "d": gib()}
        async with Supervisor(settings(**models)) as sup:
            for model in ("a", "b", "c"):
                await sup.load(model)
            async with sup.lease("a"), sup.lease("c"):
                assert await words(sup, "d")
                assert sorted(loaded(sup)) == ["a", "c", "d"]
            reason = sup.report("b").reason
            assert reason.startswith("put out for d: d needs 1.0 GiB on cpu")

    async def test_why_it_went_is_told(self) -> None:
        async with Supervisor(settings("2GiB", a=gib(), b=gib())) as sup, EventRecorder(sup) as events:
            await sup.load("a")
            await sup.load("b")
            stopped = next(event for event in events.events if event.model == "a" and event.state == "stopping")
            assert "put out for b: b needs 1.0 GiB on cpu" in stopped.reason
            assert "credit" in stopped.reason
            assert "loaded after these are put out: b (credit" in await sup.explain("a")
            assert await sup.explain("b") == "granted at once: it is ready"

    async def test_a_ready_model_is_granted_while_another_waits_for_memory(self) -> None:
        models = {"a": gib(concurrency=2), "b": gib()}
        async with Supervisor(settings("2GiB", **models)) as sup, sup.lease("a"):
            waiting = asyncio.create_task(sup.load("b"))
            await until(lambda: sup.report("b").waits_for_memory)
            assert await words(sup, "a")
            assert sup.report("b").queue == 1
            waiting.cancel()
            await asyncio.wait({waiting})
            assert not sup.report("b").waits_for_memory
            assert loaded(sup) == ["a"]

    async def test_the_victim_asked_for_again_while_it_goes_is_loaded_after(self) -> None:
        slow = "ignore=SIGTERM"
        models = {"a": gib(slow, stop_grace="300ms"), "b": gib(stop_grace="300ms")}
        async with Supervisor(settings("2GiB", **models)) as sup:
            await sup.load("a")
            async with anyio.create_task_group() as callers:
                callers.start_soon(words, sup, "b")
                await until(lambda: state(sup, "a") == "stopping")
                with anyio.fail_after(LIMIT):
                    assert await words(sup, "a")

    async def test_what_never_fits_puts_nobody_out(self) -> None:
        async with Supervisor(settings(a=gib(), big=gib(memory="4GiB"))) as sup:
            await sup.load("a")
            with pytest.raises(DoesNotFit) as caught:
                await sup.load("big")
            assert caught.value.details["permanent"]
            assert loaded(sup) == ["a"]

    async def test_so_many_models_and_no_more(self) -> None:
        async with Supervisor(settings("8GiB", {"max_loaded": 1}, a=gib(), b=gib())) as sup:
            await sup.load("a")
            await sup.load("b")
            assert loaded(sup) == ["b"]

    async def test_a_young_one_stays_for_a_while(self) -> None:
        async with Supervisor(settings("2GiB", {"min_residency": "700ms"}, a=gib(), b=gib())) as sup:
            await sup.load("a")
            began = asyncio.get_running_loop().time()
            await sup.load("b")
            assert asyncio.get_running_loop().time() - began > 0.6


class TestWishes:
    async def test_a_pinned_one_goes_by_force_only_and_comes_up_again_after_a_crash(self) -> None:
        async with Supervisor(settings("2GiB", a=gib(pinned=True, keep_alive="0s"), b=gib())) as sup:
            assert await words(sup, "a")
            with pytest.raises(DoesNotFit, match="pinned"):
                await sup.load("b")
            with pytest.raises(Conflict):
                await sup.unload("a")
            pid = sup.report("a").pid
            os.kill(pid, 9)
            await until(lambda: state(sup, "a") == "ready" and sup.report("a").pid != pid)
            await sup.unload("a", force=True)
            await sup.load("b")

    async def test_preloaded_by_priority_and_only_what_fits(self) -> None:
        models = {
            "low": gib(preload=True, priority="low"),
            "high": gib(preload=True, priority="high"),
            "plain": gib(),
        }
        async with Supervisor(settings("2GiB", **models)) as sup:
            await until(lambda: loaded(sup) == ["high"])
            await until(lambda: not sup.report("low").waits_for_memory)
            assert state(sup, "low") == "stopped"

    async def test_who_went_for_a_guest_comes_back(self) -> None:
        models = {"home": gib() | {"return": True}, "guest": gib()}
        async with Supervisor(settings("2GiB", **models)) as sup:
            await sup.load("home")
            await sup.load("guest")
            assert loaded(sup) == ["guest"]
            await sup.unload("guest")
            await until(lambda: loaded(sup) == ["home"])

    async def test_the_keep_alive_of_a_request_holds(self) -> None:
        async with Supervisor(settings(a=gib())) as sup:
            async with sup.lease("a", keep_alive=-1):
                pass
            assert sup.report("a").expires is None
            async with sup.lease("a", keep_alive=0):
                pass
            await until(lambda: state(sup, "a") == "stopped")


class TestFailing:
    async def test_one_that_fails_again_and_again_is_left_alone_for_a_while(self) -> None:
        async with Supervisor(settings(a=gib("exit=3"))) as sup:
            for _ in range(5):
                with pytest.raises(LoadFailed):
                    await sup.load("a")
            exits = sup.report("a").exits
            with pytest.raises(Backoff, match="failed 5 times in a row") as caught:
                await sup.load("a")
            assert caught.value.retry_after
            assert caught.value.details["exit_code"] == 3
            assert sup.report("a").exits == exits
            await sup.unload("a")
            with pytest.raises(LoadFailed):
                await sup.load("a")


class TestMemory:
    async def test_what_grows_past_its_reservation_is_seen(self) -> None:
        scenario = "alloc@ready=200"
        models = {"a": gib(scenario, memory="64MiB")}
        async with Supervisor(settings(**models)) as sup, EventRecorder(sup) as events:
            await sup.load("a")
            await until(lambda: sup.report("a").memory.measured > 200 << 20)
            (device,) = sup.status().devices
            assert device.reserved > 200 << 20
            await until(lambda: any("where 64.0 MiB were reserved" in event.reason for event in events.events))

    async def test_what_was_learnt_is_kept_and_rubbish_survived(self, caplog: pytest.LogCaptureFixture) -> None:
        file = state_directory() / LEARNT_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\x00rubbish")
        try:
            async with Supervisor(settings(a=gib())) as sup:
                assert "learnt anew" in caplog.text
                assert await words(sup, "a")
                await until(lambda: sup.report("a").memory.measured)
                await sup.unload("a")
                await until(lambda: file.read_bytes()[:1] == b"{")
            (lesson,) = json.loads(file.read_bytes())["models"].values()
            assert lesson["seconds"] > 0
        finally:
            file.unlink()


class TestReload:
    async def test_only_what_changed_is_drained(self) -> None:
        old = settings(same=gib(), changed=gib(), gone=gib())
        new = settings(same=gib(), changed=gib("tokens=1"), fresh=gib())
        async with Supervisor(old) as sup:
            for model in ("same", "changed", "gone"):
                await sup.load(model)
            pid = sup.report("same").pid
            async with sup.lease("changed") as lease:
                await sup.reload(new)
                assert state(sup, "changed") == "draining"
                assert lease.base_url
            await until(lambda: [report.model for report in sup.status().runners] == ["same", "changed", "fresh"])
            assert sup.report("same").pid == pid
            assert await words(sup, "changed") == "t1 "
            assert await words(sup, "fresh") == "t1 t2 t3 "
            with pytest.raises(ModelNotFound):
                await sup.load("gone")

    async def test_a_device_that_is_not_here_changes_nothing(self) -> None:
        async with Supervisor(settings(a=gib())) as sup:
            with pytest.raises(ConfigError, match=r"models\.a\.device: no such device here"):
                await sup.reload(settings(a=gib(device="cuda:9")))
            assert await words(sup, "a")


async def test_status_answers_while_five_loads_hang() -> None:
    models = {f"m{number}": gib("load=forever", memory="64MiB") for number in range(5)}
    async with Supervisor(settings(**models)) as sup:
        loads = [asyncio.create_task(sup.load(model)) for model in models]
        await until(lambda: all(report.state == "starting" for report in sup.status().runners))
        times = []
        for _ in range(20):
            began = asyncio.get_running_loop().time()
            sup.status()
            times.append(asyncio.get_running_loop().time() - began)
        assert sorted(times)[10] < 0.01
        for model in models:
            await sup.unload(model, force=True)
        for load in loads:
            with pytest.raises(Unloaded):
                await load
