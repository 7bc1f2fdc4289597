"""What the fault tests share: a supervisor over fake runners, and looking at processes and states from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import psutil

from mlxsup import CompletionChunk, RunnerReport, Supervisor
from mlxsup.config import Settings, parse
from mlxsup.engines import KEYS
from tests.waiting import LIMIT, until


def settings(**models: dict[str, Any]) -> Settings:
    """The configuration of these models; each stops fast unless it says otherwise."""
    entries = {name: {"stop_grace": "2s", **entry} for name, entry in models.items()}
    return parse({"models": entries}, KEYS)


def supervisor(**models: dict[str, Any]) -> Supervisor:
    return Supervisor(settings(**models))


def report(sup: Supervisor, model: str = "m") -> RunnerReport:
    return next(found for found in sup.status().runners if found.model == model)


async def promised(limit: float, attempt: Callable[[], Awaitable[float]], tries: int = 5) -> None:
    """See that the best of some attempts takes less: a busy machine does not slow every one of them, a built-in delay does."""
    took: list[float] = []
    while not took or (min(took) >= limit and len(took) < tries):
        took.append(await attempt())
    assert min(took) < limit, f"promised are {limit:g} s, it took {', '.join(f'{each:.3f}' for each in took)}"


async def state_is(sup: Supervisor, *states: str, model: str = "m", limit: float = LIMIT) -> float:
    return await until(lambda: report(sup, model).state in states, limit)


async def collect(sup: Supervisor, model: str = "m", **fields: Any) -> list[CompletionChunk]:
    """All chunks of one answer."""
    fields.setdefault("prompt", "p")
    async with sup.completion(model, **fields) as chunks:
        return [chunk async for chunk in chunks]


WAYS = ("completion", "lease", "load")
"""How a program asks for a model."""


async def use(sup: Supervisor, way: str, model: str = "m", **terms: Any) -> None:
    """Ask for a model in one of these ways, and have done with it."""
    if way == "completion":
        await collect(sup, model, **terms)
    elif way == "load":
        await sup.load(model, **terms)
    else:
        async with sup.lease(model, **terms):
            pass


def words(chunks: list[CompletionChunk]) -> str:
    return "".join(chunk.content for chunk in chunks)


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def rss() -> int:
    return int(psutil.Process().memory_info().rss)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    assert pid > 0
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Record:
    """The file into which a fake runner writes what happens to it, for `record=PATH`."""

    def __init__(self, folder: Path, name: str = "record") -> None:
        self.path = folder / name

    def lines(self, start: str = "") -> list[str]:
        text = self.path.read_text() if self.path.exists() else ""
        return [line for line in text.splitlines() if line.startswith(start)]

    def pids(self, what: str = "start") -> list[int]:
        """The pids of `start PID` or `fork PID` lines."""
        return [int(line.split()[1]) for line in self.lines(f"{what} ")]


class LoopLag:
    """Measures how late the loop runs what is due, every 5 ms, while it is entered."""

    def __init__(self) -> None:
        self.lags: list[float] = []

    async def measure(self) -> None:
        while True:
            due = time.monotonic() + 0.005
            await anyio.sleep(0.005)
            self.lags.append(time.monotonic() - due)

    def at(self, share: float) -> float:
        """The lag that this share of the looks did not exceed."""
        ordered = sorted(self.lags)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
