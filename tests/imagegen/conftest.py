"""Real runner processes with the weights that ship."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PATIENCE = 20.0
"""Seconds that anything may take before a test gives up on it."""

RUNNER = (sys.executable, "-m", "mlxsup.imagegen", "--imagegen-engine", "--model", "builtin:emoji")


@dataclass
class Child:
    """A runner process that listens on `socket`."""

    process: subprocess.Popen[bytes]
    socket: str
    lines: list[str] = field(default_factory=list)

    def line_with(self, words: str) -> str:
        """Read stderr up to the line that has these words."""
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            self.lines.append(raw.decode().rstrip("\n"))
            if words in self.lines[-1]:
                return self.lines[-1]
        raise AssertionError(f"no line with {words!r} in {self.lines}")

    def last_line(self) -> str:
        """Read stderr to its end."""
        assert self.process.stderr is not None
        self.lines += self.process.stderr.read().decode().splitlines()
        return self.lines[-1]

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Open an HTTP client on the socket."""
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        connector = aiohttp.UnixConnector(self.socket)
        async with aiohttp.ClientSession("http://runner", connector=connector, timeout=timeout) as session:
            yield session

    async def health(self) -> tuple[int, dict[str, Any]]:
        """Ask once."""
        async with self.session() as session, session.get("/health") as answer:
            return answer.status, await answer.json()

    async def complete(self, **fields: object) -> list[dict[str, Any]]:
        """Have a picture made; return all lines of the answer."""
        async with self.session() as session, session.post("/completion", json=fields) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "application/x-ndjson"
            return [json.loads(line) for line in (await answer.read()).splitlines()]

    async def refusal(self, body: bytes | io.BytesIO) -> tuple[int, str, str]:
        """Send a body that is refused; return status, code and message."""
        async with self.session() as session, session.post("/completion", data=body) as answer:
            error = (await answer.json())["error"]
            return answer.status, error["code"], error["message"]


Start = Callable[..., Child]


def _start(socket: Path, *, command: tuple[str, ...] = RUNNER, env: dict[str, str] | None = None) -> Child:
    ready, write_end = os.pipe()
    argv = [*command, "--socket", str(socket), "--ready-fd", str(write_end)]
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(write_end,),
            env={**os.environ, **(env or {})},
        )
        os.close(write_end)
        assert os.read(ready, 1), "the runner ended before it was ready"
    finally:
        os.close(ready)
    return Child(process, str(socket))


def _end(child: Child) -> None:
    child.process.kill()
    child.process.wait(PATIENCE)
    assert child.process.stderr is not None
    child.process.stderr.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """One ready runner for all tests of a module that leave it as they found it."""
    child = _start(tmp_path_factory.mktemp("runner") / "s")
    yield child
    _end(child)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ready runners of the test's own; arguments as for `_start` without the socket."""
    children: list[Child] = []

    def start_one(**options: Any) -> Child:
        children.append(_start(tmp_path / f"s{len(children)}", **options))
        return children[-1]

    yield start_one
    for child in children:
        _end(child)
