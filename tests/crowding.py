"""What the tests of many models on a small device share: their configuration, and somebody who looks on."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import psutil

from mlxsup import Event, Supervisor
from mlxsup.config import Settings, parse
from mlxsup.engines import KEYS
from mlxsup.testing import fake_runner


def settings(total: str = "3.5GiB", scheduler: dict[str, Any] | None = None, /, **models: dict[str, Any]) -> Settings:
    """The configuration of these models on a device that has `total`, of which a part is its overhead."""
    entries = {name: {"memory": "1GiB", "stop_grace": "2s", **entry} for name, entry in models.items()}
    common = {"min_residency": "0s", **(scheduler or {})}
    return parse({"scheduler": common, "devices": {"cpu": total}, "models": entries}, KEYS)


def gib(scenario: str = "", **keys: Any) -> dict[str, Any]:
    """A model of 1 GiB."""
    return fake_runner(scenario, **{"memory": "1GiB", **keys})


class Onlooker:
    """Looks at the runners in the very moment of each transition: how many there are, and whether one goes while it is used.

    `forgive` names a model that may go: it was killed.
    """

    def __init__(self, sup: Supervisor) -> None:
        self.complaints: list[str] = []
        self.most_reported = self.most_seen = 0
        self.forgive: set[str] = set()
        self._sup = sup
        self._used = Counter[str]()
        sup._registry().subscribe(self)

    def take(self, event: Event | None) -> None:
        """Look, as the registry tells of a transition."""
        if event is None:
            return
        self.most_reported = max(self.most_reported, sum(each.pid > 0 for each in self._sup.status().runners))
        if event.state == "ready":
            asyncio.get_running_loop().call_soon(self._count)
        if event.state == "stopping" and self._used[event.model] and event.model not in self.forgive:
            self.complaints.append(f"{event.model} is stopped while it is used: {event.reason}")

    @contextmanager
    def using(self, model: str) -> Iterator[None]:
        """Use a model that is leased; its process must be the same all the time."""
        pid = self._sup.report(model).pid
        self._used[model] += 1
        try:
            yield
        finally:
            self._used[model] -= 1
            stays = self._sup.report(model).pid == pid and psutil.pid_exists(pid)
            if not stays and model not in self.forgive:
                self.complaints.append(f"{model} was stopped while it was leased")

    def _count(self) -> None:
        self.most_seen = max(self.most_seen, len(processes()))


async def two_hundred_requests(sup: Supervisor, models: list[str]) -> list[str]:
    """Ask for models of 1 GiB from 20 clients in random order, where three fit; returns what was wrong with the answers."""
    luck = random.Random(7)
    orders = [[luck.choice(models) for _ in range(10)] for _ in range(20)]
    asked, granted = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    tickets = itertools.count()
    onlooker = Onlooker(sup)

    async def client(order: list[str]) -> None:
        for model in order:
            ticket = next(tickets)
            asked[model].append(ticket)  # and nothing is awaited before the question is put
            if luck.random() < 0.5:
                async with sup.lease(model):
                    granted[model].append(ticket)
                    with onlooker.using(model):
                        await asyncio.sleep(luck.uniform(0, 0.01))
            else:
                async with sup.completion(model, prompt="p") as chunks:
                    await chunks.start()
                    granted[model].append(ticket)
                    assert "".join([chunk.content async for chunk in chunks]) == "t1 "

    async with anyio.create_task_group() as clients:
        for order in orders:
            clients.start_soon(client, order)
    wrong = onlooker.complaints
    if granted != asked:
        wrong.append("not first come, first served")
    if (most := (onlooker.most_reported, onlooker.most_seen)) != (3, 3):
        wrong.append(f"three fit, at most {most[0]} were reported and {most[1]} were there")
    if (evicted := sum(report.exits for report in sup.status().runners)) <= 20:
        wrong.append(f"only {evicted} had to go: this says nothing")
    return wrong


def processes() -> list[int]:
    """The pids of all runners that this process has really started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any("fake_runner" in word for word in child.cmdline()):
                found.append(child.pid)
    return found
