"""A program that forks out of its loop, and whose child unwinds: what runs is the parent's, and stays.

And one that ignores SIGCHLD.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxsup.testing import fake_runner
from tests.faults.house import alive, supervisor
from tests.waiting import until

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, os, sys
import uvloop
from mlxsup.testing import fake_runner
from tests.faults.house import alive, supervisor

async def main():
    async with supervisor(m=fake_runner()) as sup:
        await sup.load("m")
        guard, pid = sup._registry()._guard, sup.report("m").pid
        sentinel = guard._sentinel.pid
        child = os.fork()
        if child == 0:
            sys.exit(3)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(ended, alive(pid), alive(sentinel), guard.folder.exists(), pid, sentinel, guard.folder, flush=True)
        os._exit(0)  # the loop no longer hears everything: its child closed what they share

{"asyncio": asyncio, "uvloop": uvloop}[sys.argv[1]].run(main())
"""


@pytest.mark.loops("asyncio")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.timeout(60)
async def test_a_forked_child_that_unwinds_ends_nothing(loop: str) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, loop], capture_output=True, text=True, check=False, cwd=ROOT, timeout=40
        )

    done = await asyncio.to_thread(run)
    ended, *there, pid, sentinel, folder = done.stdout.split() or [done.stderr]
    assert (ended, there) == ("3", ["True"] * 3), done.stderr
    assert re.search(r"forked out of the event loop of \d+ must end by os\._exit\(\)", done.stderr)
    await until(lambda: not alive(int(pid)))  # it was watched to the end
    await until(lambda: not alive(int(sentinel)))
    assert not Path(folder).exists()


@pytest.mark.loops("asyncio")
async def test_who_ignores_the_ends_of_children_is_told(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        async with supervisor(m=fake_runner()):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert sum("signal.signal(signal.SIGCHLD, signal.SIG_DFL)" in record.message for record in caplog.records) == 1


async def test_who_does_not_is_not(caplog: pytest.LogCaptureFixture) -> None:
    async with supervisor(m=fake_runner()):
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
