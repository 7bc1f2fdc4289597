"""A model that goes for another one is asked for again, before, while and after it goes: it comes back, and nobody hangs.

Whoever takes a victim back, or grants it once more, lets the one who waits for its memory wait for ever. So 210 interleavings
of asking, leaving, ending and a crash are played with real processes, half of them on each loop.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from typing import Any

import anyio
import pytest

from mlxsup import MlxsupError, Supervisor
from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.scheduling.backoff import Backoff
from mlxsup.scheduling.scheduler import Limits

from .crowding import Onlooker, gib, settings

pytestmark = pytest.mark.anyio

LIMIT = 20.0
PARTS, EACH = 7, 15
QUICK = Limits(patience=0.02, backoff=Backoff(first=0.05))
"""Who waits for memory in use lets its users be the last ones soon, and what has crashed is tried again soon."""

MODELS = {"a": gib("tokens=1; delay@sigterm=0.02", drain_timeout="1h"), "b": gib("tokens=1", drain_timeout="1h")}


class Play:
    """One interleaving of what callers and fate do to models of which one fits."""

    def __init__(self, sup: Supervisor, seed: int, onlooker: Onlooker) -> None:
        self.seen = Counter[str]()
        self._sup = sup
        self._luck = random.Random(seed)
        self._seed = seed
        self._onlooker = onlooker
        self._callers: dict[asyncio.Task[None], asyncio.Event] = {}
        self._cancelled: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Play it, let all callers end, and see that all of them did and that the victim can be had again."""
        steps = ["a", "a", "b", "finish", "crash" if self._seed % 3 == 0 else "cancel"]
        self._luck.shuffle(steps)
        match self._seed % 5:
            case 0:  # asked again while it drains
                await self._sup.load("a")
                self._ask("a", hold=True)
                steps[:0] = ["b", "going", "a"]
            case 1:  # asked again while it stops
                await self._sup.load("a")
                steps[:0] = ["b", "going", "a"]
            case 2:
                await self._sup.load("a")
                self._ask("a")
            case _:
                self._ask("a")
        before = ""
        for step in steps:
            if before != "going":
                await self._pause()
            before = step
            match step:
                case "cancel":
                    self._cancel()
                case "finish":
                    self._finish()
                case "crash":
                    await self._crash()
                case "going":
                    await self._until_the_victim_goes()
                case model:
                    self._ask(model)
        await self._end()
        await self._words("a")

    def _ask(self, model: str, *, hold: bool = False) -> None:
        self.seen[f"asked while {self._sup.report(model).state}"] += 1
        leave = asyncio.Event()
        work = self._hold(model, leave) if hold or self._luck.random() < 0.6 else self._words(model)
        self._callers[asyncio.create_task(work)] = leave

    def _cancel(self) -> None:
        if under_way := [task for task in self._callers if not task.done()]:
            task = self._luck.choice(under_way)
            task.cancel()
            self._cancelled.add(task)

    def _finish(self) -> None:
        if held := [leave for task, leave in self._callers.items() if not task.done() and not leave.is_set()]:
            self._luck.choice(held).set()

    async def _crash(self) -> None:
        with anyio.move_on_after(1.0):
            while not any(report.pid > 0 for report in self._sup.status().runners):
                await asyncio.sleep(0.001)
        for report in self._sup.status().runners:
            if report.pid > 0:
                self.seen["crashed"] += 1
                self._onlooker.forgive.add(report.model)
                with suppress(ProcessLookupError):
                    os.kill(report.pid, signal.SIGKILL)

    async def _pause(self) -> None:
        """Go on at once, some turns later, a little later, or when something changes."""
        match self._luck.randrange(4):
            case 1:
                for _ in range(self._luck.randrange(1, 6)):
                    await asyncio.sleep(0)
            case 2:
                await asyncio.sleep(self._luck.uniform(0, 0.04))
            case 3:
                events = self._sup.events()
                with anyio.move_on_after(0.3):
                    await anext(events)
                events.close()

    async def _until_the_victim_goes(self) -> None:
        with anyio.move_on_after(LIMIT):
            while self._sup.report("a").state == "ready":
                await asyncio.sleep(0.001)

    async def _end(self) -> None:
        for leave in self._callers.values():
            leave.set()
        _, hanging = await asyncio.wait(self._callers, timeout=LIMIT)
        assert not hanging, [await self._sup.explain(model) for model in MODELS]
        for task in self._callers:
            if task in self._cancelled and task.cancelled():
                continue
            error = task.exception()
            if error is not None:  # only what a crash may do to those who were at it
                assert self.seen["crashed"], error
                assert isinstance(error, RunnerDied | LoadFailed), error
        assert not any(report.leases or report.queue for report in self._sup.status().runners)

    async def _hold(self, model: str, leave: asyncio.Event) -> None:
        async with self._sup.lease(model):
            with self._onlooker.using(model):
                await leave.wait()

    async def _words(self, model: str) -> None:
        with anyio.fail_after(LIMIT):
            async with self._sup.completion(model, prompt="p") as chunks:
                assert "".join([chunk.content async for chunk in chunks]) == "t1 "


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(PARTS))
async def test_the_victim_asked_for_again_comes_back_and_nobody_hangs(
    part: int, monkeypatch: pytest.MonkeyPatch, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    monkeypatch.setattr("mlxsup.registry.limits", lambda _settings: QUICK)
    first = (part + PARTS * anyio_backend[1]["use_uvloop"]) * EACH
    seen = Counter[str]()
    async with Supervisor(settings("2GiB", **MODELS)) as sup:
        onlooker = Onlooker(sup)
        for seed in range(first, first + EACH):
            play = Play(sup, seed, onlooker)
            try:
                await play.run()
            except (AssertionError, MlxsupError, TimeoutError) as error:
                error.add_note(f"in the interleaving of seed {seed}")
                raise
            assert onlooker.complaints == [], seed
            onlooker.forgive.clear()
            seen += play.seen
            for model in MODELS:
                await sup.unload(model, force=True)
        assert (onlooker.most_reported, onlooker.most_seen) == (1, 1)
    for what in (
        "asked while ready",
        "asked while draining",
        "asked while stopping",
        "crashed",
    ):
        assert seen[what], f"never {what}: this says little"
