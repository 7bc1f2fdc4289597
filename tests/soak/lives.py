"""The lives that runners lead in a soak, good and bad; each of them ends with nothing of its runner left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.errors import LoadFailed, RunnerDied, Unloaded
from mlxsup.testing import fake_runner


@dataclass(frozen=True)
class House:
    """Where lives are led: a supervisor, and a client of its HTTP API."""

    sup: Supervisor
    http: aiohttp.ClientSession


@dataclass(frozen=True)
class Life:
    """What the runner is told to do, and what is done with it."""

    scenario: str
    lead: Callable[[House, str], Awaitable[None]]


async def _good(house: House, model: str) -> None:
    await house.sup.load(model)
    async with house.sup.completion(model, prompt="p") as chunks:
        *_, last = [chunk async for chunk in chunks]
    assert last.done
    await house.sup.unload(model)


async def _watched(house: House, model: str) -> None:
    """Somebody follows the events, has seen enough and forgets them."""
    loading = asyncio.create_task(house.sup.load(model))
    async for event in house.sup.events():
        if event.model == model and event.state == "ready":
            break
    await loading
    await house.sup.unload(model)


async def _crashing(house: House, model: str) -> None:
    with contextlib.suppress(RunnerDied):
        async for _ in house.sup.completion(model, prompt="p"):
            pass
        raise AssertionError("an answer of a runner that crashed ended well")
    await house.sup.unload(model)


async def _crashing_in_load(house: House, model: str) -> None:
    with contextlib.suppress(LoadFailed):
        await house.sup.load(model)
        raise AssertionError("a runner that ended while it loaded was ready")
    await house.sup.unload(model)


async def _killed(house: House, model: str) -> None:
    await house.sup.load(model)
    os.kill(house.sup.report(model).pid, signal.SIGKILL)
    await house.sup.unload(model)


async def _left(house: House, model: str) -> None:
    async with house.sup.completion(model, prompt="p") as chunks:
        await anext(chunks)
    await house.sup.unload(model)


async def _dropped(house: House, model: str) -> None:
    async for _ in house.sup.completion(model, prompt="p"):
        break
    await house.sup.unload(model)


async def _cancelled(house: House, model: str) -> None:
    """The caller goes while it waits for its first chunk."""

    async def ask() -> None:
        async for _ in house.sup.completion(model, prompt="p"):
            pass

    asking = asyncio.create_task(ask())
    while house.sup.report(model).leases == 0:
        await asyncio.sleep(0.002)
    await _cancel(asking)
    await house.sup.unload(model)


async def _impatient(house: House, model: str) -> None:
    """The caller goes while the model loads, which is then put out."""
    loading = asyncio.create_task(house.sup.load(model))
    while house.sup.report(model).pid < 0:
        await asyncio.sleep(0.002)
    await _cancel(loading)
    await house.sup.unload(model)


async def _forced(house: House, model: str) -> None:
    with contextlib.suppress(Unloaded):
        async with house.sup.completion(model, prompt="p") as chunks:
            await anext(chunks)
            await house.sup.unload(model, force=True)
            await anext(chunks)
        raise AssertionError("an answer went on after its runner was put out")


async def _over_http(house: House, model: str) -> None:
    async with house.http.post("/completion", json={"model": model, "prompt": "p"}) as answer:
        assert answer.status == 200
        assert (await answer.read()).endswith(b"}\n")
    await house.sup.unload(model)


async def _left_over_http(house: House, model: str) -> None:
    async with house.http.post("/completion", json={"model": model, "prompt": "p"}) as answer:
        await answer.content.readline()
        answer.close()
    while house.sup.report(model).leases:
        await asyncio.sleep(0.002)
    await house.sup.unload(model)


async def _crashing_over_http(house: House, model: str) -> None:
    async with house.http.post("/completion", json={"model": model, "prompt": "p"}) as answer:
        body = await answer.read()
        assert b"runner_died" in body, body
    await house.sup.unload(model)


async def _overtaken(house: House, model: str) -> None:
    """The caller goes in the very moment in which its turn comes."""

    async def use() -> None:
        async with house.sup.lease(model):
            pass

    async with house.sup.lease(model):
        waiting = asyncio.create_task(use())
        while house.sup.report(model).queue == 0:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(waiting.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await house.sup.unload(model)


async def _of_its_own(house: House, model: str) -> None:
    """A whole supervisor comes and goes, with the model still loaded."""
    del house, model
    async with Supervisor(parse({"models": {"m": fake_runner(stop_grace="2s")}}, KEYS)) as sup:
        async for _ in sup.completion("m", prompt="p"):
            pass


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


LIVES = {
    "good": Life("", _good),
    "watched": Life("", _watched),
    "crashing": Life("stderr@crash=Error: scripted; crash@1", _crashing),
    "crashing in load": Life("exit@loading=3", _crashing_in_load),
    "killed while idle": Life("", _killed),
    "left": Life("hang@1", _left),
    "dropped": Life("hang@1", _dropped),
    "cancelled": Life("hang@first", _cancelled),
    "overtaken": Life("", _overtaken),
    "impatient": Life("load=forever", _impatient),
    "forced": Life("hang@1", _forced),
    "over http": Life("", _over_http),
    "left over http": Life("hang@1", _left_over_http),
    "crashing over http": Life("crash@1", _crashing_over_http),
    "littering": Life("fork@ready=setsid+ignore; stderr@ready=something to say", _good),
    "noisy": Life("flood@1=0.5:lines; image=100000", _good),
    "of its own": Life("", _of_its_own),
}


def models(lanes: int) -> dict[str, dict[str, Any]]:
    """One model for each life, address and lane, named `LANE ADDRESS LIFE`; every other lane's announce themselves."""
    return {
        f"{lane}-{address}-{name.replace(' ', '-')}": fake_runner(
            life.scenario,
            address="tcp" if address == "tcp" else "unix",
            announce=bool(lane % 2),
            stop_grace="2s",
            keep_alive=-1,
        )
        for lane in range(lanes)
        for address in ("unix", "tcp")
        for name, life in LIVES.items()
    }
