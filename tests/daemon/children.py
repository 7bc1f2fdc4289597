"""Real `mlxsup` processes for the tests of the daemon and of the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import psutil

LIMIT = 15.0
"""Seconds that a test waits for anything a process does."""

_RESET = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
"""A test run in the background of a shell ignores SIGINT, and so would its children."""


class Child:
    """An `mlxsup` process in a process group of its own, whose output is read all the time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.out = bytearray()
        self.err = bytearray()
        self._more = asyncio.Condition()
        assert process.stdout is not None
        assert process.stderr is not None
        self._pumps = [
            asyncio.create_task(self._pump(process.stdout, self.out)),
            asyncio.create_task(self._pump(process.stderr, self.err)),
        ]

    async def _pump(self, stream: asyncio.StreamReader, into: bytearray) -> None:
        while part := await stream.read(65536):
            async with self._more:
                into += part
                self._more.notify_all()

    async def says(self, words: str) -> str:
        """Wait until a line of stderr has these words, and return it."""
        with anyio.fail_after(LIMIT):
            async with self._more:
                while True:
                    for line in self.lines():
                        if words in line:
                            return line
                    await self._more.wait()

    async def prints(self, words: str) -> None:
        """Wait until stdout has these words."""
        with anyio.fail_after(LIMIT):
            async with self._more:
                await self._more.wait_for(lambda: words.encode() in self.out)

    def lines(self) -> list[str]:
        """The lines on stderr so far."""
        return self.err.decode().splitlines()

    def send(self, which: signal.Signals) -> None:
        """Send a signal to the process group, as a terminal does."""
        os.killpg(self.pid, which)

    async def ended(self) -> int:
        """Wait for the end of the process and of its output; return the exit code."""
        with anyio.fail_after(LIMIT):
            code = await self._process.wait()
            await asyncio.gather(*self._pumps)
        return code


@contextlib.asynccontextmanager
async def running(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> AsyncIterator[Child]:
    """Start `mlxsup ARGUMENTS`; it is killed on leaving if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _RESET, sys.executable, "-m", "mlxsup", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    child = Child(process)
    try:
        yield child
    finally:
        if process.returncode is None:
            process.kill()
        await child.ended()


async def command(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str, list[str]]:
    """Run `mlxsup ARGUMENTS` to its end; return exit code, stdout and the lines of stderr."""
    async with running(*arguments, cwd=cwd, env=env) as child:
        code = await child.ended()
        return code, child.out.decode(), child.lines()


class Daemon:
    """A daemon that is ready, with an HTTP client whose base is its URL."""

    def __init__(self, child: Child, url: str, http: aiohttp.ClientSession) -> None:
        self.child = child
        self.url = url
        self.http = http

    async def load(self, model: str) -> int:
        """Have a model loaded; returns the pid of its runner."""
        async with self.http.post("/models/load", json={"model": model}) as answer:
            assert answer.status == 200
        return await self.pid_of(model)

    async def pid_of(self, model: str) -> int:
        """The pid of a model's runner, -1 without one."""
        async with self.http.get("/runners") as answer:
            found = (await answer.json())["runners"]
        pid: int = next(runner["pid"] for runner in found if runner["model"] == model)
        return pid


@contextlib.asynccontextmanager
async def serving(config: Path, *arguments: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Daemon]:
    """Run a daemon on a free port."""
    listen = ("--listen", "127.0.0.1:0", *arguments)
    async with running("serve", "--config", str(config), *listen, cwd=config.parent, env=env) as child:
        port = json.loads(await child.says("serves on"))["listen"][0].rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=LIMIT)) as http:
            yield Daemon(child, url, http)


def write_config(folder: Path, models: Mapping[str, Mapping[str, Any]], **server: Any) -> Path:
    """Write a configuration of these models; keyword arguments are keys of `[server]`."""
    server.setdefault("listen", ["127.0.0.1:1"])  # nobody answers there
    lines = ["[server]", *(f"{key} = {json.dumps(value)}" for key, value in server.items())]
    for name, entry in models.items():
        lines.append(f"[models.{json.dumps(name)}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"stop_grace": "2s", **entry}.items()]
    path = folder / "config.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
