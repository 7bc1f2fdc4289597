"""The process that outlives the supervisor: what it ends when its supervisor is gone, and what it leaves alone."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mlxsup.runners import procfs
from mlxsup.runners.marks import MARK
from tests.waiting import LIMIT

from .children import LINUX, alive, new_mark

SLEEPER = [sys.executable, "-I", "-S", "-c", "import signal; print('up', flush=True); signal.pause()"]
DEAF = "import os, signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; os.write(1, b'up'); signal.pause()"

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start programs in sessions of their own; all are gone afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(argv: list[str] = SLEEPER, mark: str = "") -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"], **({MARK: mark} if mark else {})}
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait(LIMIT)
        assert process.stdout is not None
        process.stdout.close()


class Sentinel:
    """A sentinel and the pipe to it; `supervisor` is whose end it watches."""

    def __init__(self, folder: Path, supervisor: int | None = None) -> None:
        self.mark = new_mark()
        code = "from mlxsup.runners.sentinel import main; main()"
        argv = [sys.executable, "-S", "-c", code, self.mark, str(folder), str(supervisor or os.getpid())]
        home = Path(__file__).parents[2]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=home, start_new_session=True)

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n".encode())
        self.process.stdin.flush()

    def watch(self, pid: int) -> None:
        self.tell(f"watch {pid} {procfs.start_time(pid) or '-'}")

    def orphan(self) -> int:
        """Close the pipe, as the kernel does when the supervisor is killed; return the sentinel's exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(LIMIT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "sockets"
    made.mkdir()
    (made / "1.sock").touch()
    return made


@pytest.fixture
def sentinel(folder: Path) -> Iterator[Sentinel]:
    made = Sentinel(folder)
    yield made
    made.process.kill()
    made.process.wait(LIMIT)
    assert made.process.stdin is not None
    made.process.stdin.close()


def test_what_was_watched_is_ended_with_its_group(sentinel: Sentinel, start: Start, folder: Path) -> None:
    code = "import os, signal; [signal.signal(n, 1) for n in (1, 2, 15)]; os.fork(); os.write(1, b'up'); signal.pause()"
    runner = start([sys.executable, "-I", "-S", "-c", code])
    grandchildren = psutil.Process(runner.pid).children() or _wait_for_children(runner.pid)
    sentinel.watch(runner.pid)
    assert sentinel.orphan() == 0
    assert runner.wait(LIMIT) == -signal.SIGKILL
    assert not [process for process in grandchildren if alive(process.pid)]
    assert not folder.exists()


def _wait_for_children(pid: int) -> list[psutil.Process]:
    deadline = time.monotonic() + LIMIT
    while not (found := psutil.Process(pid).children()):
        assert time.monotonic() < deadline
    return found


def test_it_is_quick(sentinel: Sentinel, start: Start) -> None:
    """Half a second is the figure; the rest is for a busy machine."""
    runners = [start() for _ in range(5)]
    for runner in runners:
        sentinel.watch(runner.pid)
    began = time.monotonic()
    sentinel.orphan()
    assert time.monotonic() - began < 2.5
    for runner in runners:
        runner.wait(LIMIT)


@pytest.mark.skipif(not LINUX, reason="finds it by its mark")
def test_what_carries_the_mark_is_ended_though_nobody_told_of_it(sentinel: Sentinel, start: Start) -> None:
    """As one that the supervisor had just spawned when it was killed."""
    runner = start([sys.executable, "-I", "-S", "-c", DEAF], mark=f"{sentinel.mark}.1")
    other = start(mark=new_mark())
    sentinel.orphan()
    assert runner.wait(LIMIT) == -signal.SIGKILL
    assert alive(other.pid)


@pytest.mark.skipif(not LINUX, reason="prlimit")
def test_without_descriptors_it_ends_the_groups_all_the_same(sentinel: Sentinel, start: Start) -> None:
    runner = start()
    sentinel.watch(runner.pid)
    _await_signal_handlers(sentinel.process.pid)
    resource.prlimit(sentinel.process.pid, resource.RLIMIT_NOFILE, (0, 0))
    assert sentinel.orphan() == 0
    assert runner.wait(LIMIT) == -signal.SIGKILL


def test_what_was_forgotten_is_left_alone(sentinel: Sentinel, start: Start) -> None:
    runner = start()
    sentinel.watch(runner.pid)
    sentinel.tell(f"forget {runner.pid}")
    sentinel.orphan()
    assert alive(runner.pid)


@pytest.mark.skipif(not LINUX, reason="knows start times")
def test_a_later_process_of_the_same_number_is_left_alone(sentinel: Sentinel, start: Start) -> None:
    stranger = start()
    sentinel.tell(f"watch {stranger.pid} 1")
    sentinel.orphan()
    assert alive(stranger.pid)


def test_a_farewell_ends_it_and_nothing_else(sentinel: Sentinel, start: Start, folder: Path) -> None:
    runner = start(mark=f"{sentinel.mark}.1")
    sentinel.watch(runner.pid)
    sentinel.tell("bye")
    assert sentinel.process.wait(LIMIT) == 0
    assert alive(runner.pid)
    assert folder.exists()


def test_it_goes_on_when_one_of_many_is_gone_already(sentinel: Sentinel, start: Start) -> None:
    gone, runner = start(), start()
    sentinel.watch(gone.pid)
    sentinel.watch(runner.pid)
    gone.kill()
    gone.wait(LIMIT)
    assert sentinel.orphan() == 0
    assert runner.wait(LIMIT) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_ends_the_supervisor_does_not_end_it(sentinel: Sentinel, start: Start, number: signal.Signals) -> None:
    """A terminal that closes, a Ctrl-C, a `kill` of everything: it must stay until it has done its work."""
    runner = start()
    sentinel.watch(runner.pid)
    _await_signal_handlers(sentinel.process.pid)
    sentinel.process.send_signal(number)
    assert sentinel.orphan() == 0
    assert runner.wait(LIMIT) == -signal.SIGKILL


def _await_signal_handlers(pid: int) -> None:
    """Wait until it ignores them: before that it is no sentinel yet."""
    if not LINUX:
        time.sleep(0.5)
        return
    deadline = time.monotonic() + LIMIT
    while True:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
        if int(line.split()[1], 16) & (1 << (signal.SIGHUP - 1)):
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(not LINUX, reason="pidfd")
def test_a_supervisor_whose_child_holds_the_pipe_open_is_missed_all_the_same(folder: Path, start: Start) -> None:
    """A host program that forks without exec keeps a copy of the pipe's end in its child."""
    supervisor, runner = start(), start()
    sentinel = Sentinel(folder, supervisor.pid)
    sentinel.watch(runner.pid)
    _await_signal_handlers(sentinel.process.pid)
    supervisor.kill()
    assert sentinel.process.wait(LIMIT) == 0  # with the pipe still open here
    assert runner.wait(LIMIT) == -signal.SIGKILL
    assert sentinel.process.stdin is not None
    sentinel.process.stdin.close()


FORKING = """
import os, signal, subprocess, sys
code = "import os; vars(os).pop('pidfd_open', None); from mlxsup.runners.sentinel import main; main()"
argv = [sys.executable, "-S", "-c", code, sys.argv[1], sys.argv[2], str(os.getpid())]
sentinel = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=sys.argv[3], start_new_session=True)
sentinel.stdin.write(f"watch {sys.argv[4]} -\\n".encode())
sentinel.stdin.flush()
if os.fork():
    os.write(1, b"up")
signal.pause()
"""


def test_so_it_is_where_the_system_does_not_tell_of_its_end(folder: Path, start: Start) -> None:
    """As on macOS: nothing but its parent's pid says so."""
    runner = start()
    home = Path(__file__).parents[2]
    supervisor = start([sys.executable, "-c", FORKING, new_mark(), str(folder), str(home), str(runner.pid)])
    holds_the_pipe = [one for one in psutil.Process(supervisor.pid).children() if os.getpgid(one.pid) == supervisor.pid]
    assert len(holds_the_pipe) == 1
    supervisor.kill()
    try:
        assert runner.wait(LIMIT) == -signal.SIGKILL
    finally:
        holds_the_pipe[0].kill()


def test_a_folder_whose_name_somebody_else_has_taken_is_left_alone(sentinel: Sentinel, folder: Path) -> None:
    precious = folder.with_name("precious")
    folder.rename(precious)
    folder.symlink_to(precious)
    assert sentinel.orphan() == 0
    assert (precious / "1.sock").exists()


def test_the_folder_it_was_told_of_last_is_removed(sentinel: Sentinel, folder: Path) -> None:
    other = folder.with_name("with space")
    other.mkdir()
    sentinel.tell(f"folder {os.fsencode(other).hex()}")
    assert sentinel.orphan() == 0
    assert not other.exists()
    assert folder.exists()


@pytest.mark.skipif(not LINUX, reason="figures are of Linux")
def test_it_is_small(sentinel: Sentinel) -> None:
    _await_signal_handlers(sentinel.process.pid)
    assert psutil.Process(sentinel.process.pid).memory_info().rss <= 12 << 20


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_it_sleeps(sentinel: Sentinel) -> None:
    _await_signal_handlers(sentinel.process.pid)
    process = psutil.Process(sentinel.process.pid)
    deadline = time.monotonic() + LIMIT
    while process.status() != psutil.STATUS_SLEEPING:
        assert time.monotonic() < deadline
    before = process.num_ctx_switches().voluntary
    time.sleep(0.3)  # what is looked for is that nothing happens
    assert process.num_ctx_switches().voluntary - before <= 2
