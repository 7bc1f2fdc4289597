"""Zombies that fall to this program when their parent ends, as to pid 1 of a container, are reaped; its own children are not."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from mlxsup.runners import procfs
from tests.waiting import until

from .children import LINUX, alive, child, python

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not LINUX, reason="elsewhere orphans fall to pid 1 alone")]

SET_CHILD_SUBREAPER = 36

ORPHANS = """
    import os, signal
    def orphan(name, lasting, session):
        parent = os.fork()
        if parent == 0:
            if os.fork() == 0:
                if session:
                    os.setsid()
                os.write(1, f"{name} {os.getpid()}\\n".encode())
                while lasting:
                    signal.pause()
            os._exit(0)
        os.waitpid(parent, 0)
    orphan("ended", False, False)
    orphan("lasting", True, False)
    orphan("away", True, True)
    signal.pause()
"""


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans below this program fall to it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def _ended() -> subprocess.Popen[bytes]:
    """A child of this program that nobody has waited for yet."""
    made = subprocess.Popen([sys.executable, "-I", "-S", "-c", "raise SystemExit(7)"])
    _see_end(made.pid)
    return made


def _see_end(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.usefixtures("subreaper")
async def test_nothing_of_a_runner_stays_in_the_table() -> None:
    with _ended() as own:
        async with child(python(ORPHANS)) as it:
            pids = [await it.heard.number(f"{name} ") for name in ("ended", "lasting", "away")]
            await until(lambda: not alive(pids[0]))
            assert all(map(psutil.pid_exists, pids))
            await until(lambda: {psutil.Process(pid).ppid() for pid in pids} == {os.getpid()})
            it.process.signal_group(signal.SIGKILL)
            await it.watcher
            assert await it.process.sweep() == []
            assert not [pid for pid in pids if psutil.pid_exists(pid)]
            assert await it.process.sweep() == []
        assert own.wait() == 7


@pytest.mark.usefixtures("subreaper")
async def test_a_runner_that_was_not_reaped_yet_is_left_to_who_waits_for_it() -> None:
    async with child(python("raise SystemExit(7)")) as it:
        with suppress(ChildProcessError):  # asyncio may have waited for it, in a thread
            _see_end(it.process.pid)
        it.process._reap_orphans({it.process.pid: procfs.start_time(it.process.pid)})
        assert (await it.watcher).code == 7
