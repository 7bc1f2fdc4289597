"""Real processes that make room for others: their memory is looked for when they are gone, and who is spared goes on."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress

import anyio
import msgspec
import psutil
import pytest

from mlxsup import Supervisor, policies, registry
from mlxsup.config import Settings
from mlxsup.machine import Machine
from mlxsup.scheduling.scheduler import Limits
from mlxsup.testing import EventRecorder
from tests import waiting

from .crowding import gib, processes, settings

pytestmark = pytest.mark.anyio
LIMIT = 15.0
until = functools.partial(waiting.until, limit=LIMIT)
MIB = 1 << 20


def with_limits(monkeypatch: pytest.MonkeyPatch, **keys: float) -> None:
    """Have the scheduler wait other times than the usual ones."""

    def limits(of: Settings) -> Limits:
        return msgspec.structs.replace(policies.limits(of), **keys)

    monkeypatch.setattr(registry, "limits", limits)


def held() -> int:
    """The memory of all runners."""
    sizes = []
    for pid in processes():
        with suppress(psutil.Error):
            sizes.append(psutil.Process(pid).memory_info().rss)
    return sum(sizes)


async def test_memory_of_who_went_is_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look once a second is put off for an hour here, so that nobody else sees that the memory is back."""

    async def free(machine: Machine, now: float) -> int:
        return 1024 * MIB - await asyncio.to_thread(held)

    monkeypatch.setattr(Machine, "_free_at_home", free)
    monkeypatch.setattr(registry, "OBSERVE_EVERY", 3600.0)
    with_limits(monkeypatch, settle=3600.0)
    models = {"a": gib("alloc@ready=250", memory="300MiB"), "b": gib(memory="400MiB")}
    async with Supervisor(settings("1GiB", **models)) as sup:
        await sup.load("a")
        with anyio.fail_after(LIMIT):
            await sup.load("b")
        assert sup.report("a").state == "stopped"
        assert sup.report("a").reason.startswith("put out for b: b needs 400.0 MiB on cpu")


async def test_who_was_drained_for_one_that_has_left_takes_requests_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch, patience=0.1)
    models = {"a": gib(concurrency=4), "b": gib()}
    async with Supervisor(settings("2GiB", **models)) as sup, EventRecorder(sup) as recorder, sup.lease("a"):
        pid = sup.report("a").pid
        waits = asyncio.create_task(sup.load("b"))
        await until(lambda: sup.report("a").state == "draining")
        behind = asyncio.create_task(sup.load("a"))
        await until(lambda: sup.report("a").queue == 1)
        waits.cancel()
        await asyncio.wait({waits})
        assert sup.report("a").state == "ready"
        assert sup.report("a").note == ""
        assert await sup.explain("a") == "granted at once: it is ready"
        with anyio.fail_after(LIMIT):
            await behind
            async with sup.lease("a"):
                assert sup.report("a").leases == 2
        assert sup.report("a").pid == pid, "it was not loaded anew"
        last = await recorder.until("a", "ready", times=2)
        assert (last.previous, last.reason) == ("draining", "its memory is not needed any more")
        assert recorder.states("a") == ["starting", "ready", "draining", "ready"]
