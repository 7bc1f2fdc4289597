"""`mlxsup serve` on a terminal: SIGHUP reloads while the terminal is there, and ends the daemon when it has been closed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import psutil
import pytest

from mlxsup.testing import fake_runner
from tests.daemon.children import LIMIT, alive, write_config
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]

_OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
"""Makes the terminal at stdin the one that controls us, as a terminal window does for its shell."""


class _Window:
    """The other side of a terminal that `mlxsup serve` runs on."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._master = master
        self._shown = ""
        self._open = True

    async def shows(self, words: str) -> str:
        """Read on until the terminal has shown this; return all since the start."""
        with anyio.fail_after(LIMIT):
            while words not in self._shown:
                await anyio.wait_readable(self._master)
                self._shown += os.read(self._master, 65536).decode()
        return self._shown

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._master)


@contextlib.asynccontextmanager
async def _serving_on_terminal(config: Path) -> AsyncIterator[_Window]:
    master, slave = pty.openpty()
    program = (sys.executable, "-m", "mlxsup", "serve", "--config", str(config), "--listen", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _OWN, *program),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=config.parent,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(slave)
    window = _Window(master, process)
    try:
        yield window
    finally:
        window.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_closing_the_terminal_ends_the_daemon_in_order_and_its_runners(tmp_path: Path) -> None:
    record = tmp_path / "record"
    config = write_config(tmp_path, {"m": {**fake_runner(f"record={record}"), "preload": True}})
    async with _serving_on_terminal(config) as window:
        await window.shows("serves on")
        await until(record.exists)
        runners = [child.pid for child in psutil.Process(window.process.pid).children(recursive=True)]
        assert runners
        window.close()
        with anyio.fail_after(LIMIT):
            assert await window.process.wait() == 0
        assert not any(alive(pid) for pid in runners)


async def test_a_hangup_of_a_shell_that_leaves_the_terminal_is_no_reload(tmp_path: Path) -> None:
    async with _serving_on_terminal(write_config(tmp_path, {"m": fake_runner()})) as window:
        await window.shows("serves on")
        window.process.send_signal(signal.SIGHUP)
        window.close()
        with anyio.fail_after(LIMIT):
            assert await window.process.wait() == 0


async def test_a_hangup_with_the_terminal_still_there_reloads(tmp_path: Path) -> None:
    async with _serving_on_terminal(write_config(tmp_path, {"m": fake_runner()})) as window:
        await window.shows("serves on")
        window.process.send_signal(signal.SIGHUP)
        await window.shows("taken over; models: 1")
        window.process.send_signal(signal.SIGTERM)
        await window.shows("stopped")
        with anyio.fail_after(LIMIT):
            assert await window.process.wait() == 0
