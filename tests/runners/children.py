"""Real children for the tests of this room, and looking at them from outside."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil

from mlxsup.config import ModelSettings, parse
from mlxsup.engines import KEYS
from mlxsup.runners.marks import MARK
from mlxsup.runners.output import OutputRecord, Stream
from mlxsup.runners.process import Process
from mlxsup.testing import fake_runner
from tests.waiting import LIMIT

ENV = {"PATH": os.environ["PATH"]}
LINUX = sys.platform == "linux"


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs some lines of Python and nothing of ours."""
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), *arguments]


def model(entry: dict[str, Any] | None = None, name: str = "m", **keys: Any) -> ModelSettings:
    """The settings of one model: of a fake runner that does nothing special, unless an entry is given."""
    return parse({"models": {name: {**(entry or fake_runner()), **keys}}}, KEYS).models[name]


def scripted(scenario: str) -> list[str]:
    """The command of a fake runner that has no address: it must not come so far as to listen."""
    command: list[str] = fake_runner(scenario)["command"]
    return [part.replace("{socket}", "/nowhere/s").replace("{model}", "m") for part in command]


class Heard:
    """All lines of a child's output; waiting for one of them is the gate of most tests here."""

    def __init__(self) -> None:
        self.lines: list[tuple[Stream, str]] = []
        self.record = OutputRecord(self)
        self._more = asyncio.Event()

    def __call__(self, stream: Stream, line: str, *, is_error: bool) -> None:
        self.lines.append((stream, line))
        self._more.set()

    async def line(self, start: str) -> str:
        """Wait for the first line that begins so, and return what comes behind that."""
        with anyio.fail_after(LIMIT):
            while True:
                for _, line in self.lines:
                    if line.startswith(start):
                        return line.removeprefix(start).strip()
                self._more.clear()
                await self._more.wait()

    async def number(self, start: str) -> int:
        """The number behind such a line's beginning, as in `grandchild 4711`."""
        return int(await self.line(start))


class Child:
    """A spawned process with what it said; its watcher runs."""

    def __init__(self, process: Process, heard: Heard, watcher: asyncio.Task[Any]) -> None:
        self.process = process
        self.heard = heard
        self.watcher = watcher


def new_mark() -> str:
    return f"test-{secrets.token_hex(8)}"


async def spawn(argv: Sequence[str], *, mark: str = "", **options: Any) -> Child:
    heard = Heard()
    options.setdefault("env", ENV)
    options.setdefault("cwd", None)
    process = await Process.spawn(argv, mark=mark or new_mark(), output=heard.record, **options)
    return Child(process, heard, asyncio.create_task(process.watch()))


@asynccontextmanager
async def child(argv: Sequence[str], **options: Any) -> AsyncIterator[Child]:
    """Spawn a child and watch it; at the end it and all it left are killed."""
    made = await spawn(argv, **options)
    try:
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            made.process.signal_group(signal.SIGKILL)
            await made.watcher
            await made.process.sweep()


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marked(mark: str) -> list[int]:
    """The processes with this mark, found without the code that is tested."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(mark):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def descriptors() -> set[str]:
    """What this process has open, each with its number."""
    found = set()
    for path in Path("/proc/self/fd" if LINUX else "/dev/fd").iterdir():
        try:
            found.add(f"{path.name} {path.readlink() if LINUX else ''}")
        except OSError:  # the one that listed the folder
            continue
    return found
