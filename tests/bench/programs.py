"""Programs that are measured from outside: the daemon on either loop, and other programs of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench.figures import loop_name
from tests.daemon.children import write_config

LIMIT = 30.0
ROOT = Path(__file__).parents[2]
SOURCE = {
    "engine": "command",
    "command": [sys.executable, "-P", str(Path(__file__).with_name("source.py")), "--port", "{port}"],
    "memory": "64MiB",
    "concurrency": 256,
    "keep_alive": -1,
}
"""A model entry for tests/bench/source.py."""


class Daemon:
    """A daemon that is up: its pid, where it listens, and a client."""

    def __init__(self, pid: int, port: int, http: aiohttp.ClientSession) -> None:
        self.pid = pid
        self.port = port
        self._http = http

    async def load(self, *models: str) -> None:
        """Load models, all at once."""
        await asyncio.gather(*(self._load(model) for model in models))

    async def runners(self) -> dict[str, dict[str, Any]]:
        """What it says of its runners, by model."""
        async with self._http.get("/runners") as answer:
            return {runner["model"]: runner for runner in (await answer.json())["runners"]}

    async def _load(self, model: str) -> None:
        async with self._http.post("/models/load", json={"model": model}) as answer:
            assert answer.status == 200, await answer.text()


@contextlib.asynccontextmanager
async def daemon(models: Mapping[str, Mapping[str, Any]]) -> AsyncIterator[Daemon]:
    """`mlxsup serve` with these models, on the kind of loop that runs here."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = write_config(Path(folder), models, listen=["127.0.0.1:0"])
        words = ("-m", "tests.bench.serving", loop_name(), "serve", "--config", str(config))
        async with program(*words, stderr=asyncio.subprocess.PIPE) as process:
            assert process.stderr is not None
            port = await _port(process.stderr)
            reading = asyncio.create_task(process.stderr.read())
            timeout = aiohttp.ClientTimeout(total=LIMIT)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http:
                yield Daemon(process.pid, port, http)
            process.terminate()
            await reading
            await process.wait()


async def _port(log: asyncio.StreamReader) -> int:
    said = []
    async with asyncio.timeout(LIMIT):
        while line := (await log.readline()).decode():
            said.append(line)
            if "serves on" in line:
                return int(json.loads(line)["listen"][0].rpartition(":")[2])
    raise AssertionError(f"the daemon did not start: {said}")


@contextlib.asynccontextmanager
async def program(
    *arguments: str, stdout: int | None = None, stderr: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run Python with these arguments in a session of its own; whatever is left of that on leaving is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process.pid)
        await process.wait()


def kill_group(pgid: int) -> None:
    """SIGKILL a group that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pgid, 9)


async def outcome(*arguments: str) -> Any:
    """Run Python with these arguments to its end and return the JSON that it printed."""
    async with program(*arguments, stdout=asyncio.subprocess.PIPE) as process:
        out, _ = await process.communicate()
        assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
        return json.loads(out)


def entries(number: int, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """So many models of one kind."""
    return {f"m{index}": entry for index in range(number)}


def pids(runners: Iterable[Mapping[str, Any]]) -> list[int]:
    """The pids of those that run."""
    return [runner["pid"] for runner in runners if runner["pid"] > 0]
