"""Memory of runners that share pages: each is counted once, whoever comes and goes, and no figure jumps without a cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from mlxsup.runners import footprint, libproc, procfs
from mlxsup.runners.footprint import Observer, Part, Sight, Watched

from .children import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="Linux's /proc")

MIB = 1 << 20
SIZE = 64 * MIB
BUSY, IDLE = True, False

PROGRAM = """
import mmap, os, signal, sys
held, shared = [], None
if len(sys.argv) > 1:
    with open(sys.argv[1], "rb") as file:
        shared = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(shared[at] for at in range(0, len(shared), 4096))
def grow(*_):
    held.append(bytearray(b"x") * (64 << 20))
    os.write(1, b"grown\\n")
def fork(*_):
    if os.fork() == 0:
        shared and sum(shared[at] for at in range(0, len(shared), 4096))  # a child has no pages of files at first
        os.write(1, b"forked\\n")
        while True:
            signal.pause()
signal.signal(signal.SIGUSR1, grow)
signal.signal(signal.SIGUSR2, fork)
os.write(1, b"up\\n")
while True:
    signal.pause()
"""


class Program:
    """A process that grows by 64 MiB and forks when it is told to."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self.hear("up")

    def hear(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().decode() == f"{word}\n"

    def grow(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)
        self.hear("grown")

    def fork(self) -> int:
        before = {*procfs.children(self.pid)}
        os.kill(self.pid, signal.SIGUSR2)
        self.hear("forked")
        (child,) = {*procfs.children(self.pid)} - before
        return child

    def end_alone(self) -> None:
        """End the program and none of those it has forked."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start such programs; all are gone in the end."""
    with ExitStack() as stack:

        def started(*arguments: str) -> Program:
            argv = [sys.executable, "-I", "-S", "-c", PROGRAM, *arguments]
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
            stack.enter_context(process)
            program = Program(process)
            stack.callback(program.end)
            return program

        yield started


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file of 64 MiB."""
    path = tmp_path / "weights"
    path.write_bytes(b"w" * SIZE)
    return str(path)


class Watcher:
    """Does with an observer what a look at the machine does, in a time of its own."""

    def __init__(self, *, reserved: int = 1 << 40) -> None:
        self.observer = Observer()
        self.reserved = reserved
        self.now = 1000.0
        self.walked: list[int] = []
        self.weighed: list[int] = []

    def look(self, *programs: Program, busy: bool = IDLE, thorough: bool = False, after: float = 1.0) -> list[Sight]:
        self.now += after
        pids = [program.pid for program in programs]
        watched = [Watched(pid, {}, busy) for pid in pids]
        self.walked = self.observer.overdue(watched, self.now, thorough=thorough)
        self.observer.learn(footprint.study(self.walked, (), self.observer.leaving), self.now)
        sights = self.observer.look(pids)
        self.weighed = [
            pid
            for pid, sight in zip(pids, sights, strict=True)
            if self.observer.unweighed(pid, self.now, wanted=sight.used > self.reserved, thorough=thorough)
        ]
        self.observer.learn(footprint.study((), self.weighed, self.observer.leaving), self.now)
        return self.observer.look(pids)


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    """It is closed in the end, and nothing is left open: that is a rule of the house."""
    made = Watcher()
    yield made
    made.observer.close()


def near(size: int) -> object:
    return pytest.approx(size, abs=8 * MIB)


def test_weights_that_two_runners_share_are_counted_once(start: Start, weights: str, watcher: Watcher) -> None:
    one, other = start(weights), start(weights)
    plain = watcher.look(one, other)
    assert [sight.proportional for sight in plain] == [None, None]  # nobody asked
    assert all(sight.used == sight.resident > SIZE for sight in plain)
    first, second = watcher.look(one, other, thorough=True)
    assert sum(sight.used for sight in plain) - first.used - second.used > 0.9 * SIZE
    assert first.used == near(first.resident - SIZE // 2)
    assert first.needed == first.resident  # what is learnt of it must do for one that is alone


def test_the_figure_goes_on_from_what_was_weighed(start: Start, weights: str, watcher: Watcher) -> None:
    one, other = start(weights), start(weights)
    before = watcher.look(one, other, thorough=True)[0]
    for _ in range(3):
        assert watcher.look(one, other)[0].used == before.used  # it does not go back to what is resident
        assert watcher.weighed == []
    one.grow()
    after = watcher.look(one, other)[0]
    assert watcher.weighed == []
    assert after.used - before.used == near(SIZE)


def test_who_goes_leaves_what_was_shared_to_the_other(start: Start, weights: str, watcher: Watcher) -> None:
    one, other = start(weights), start(weights)
    before = watcher.look(one, other, thorough=True)[0]
    other.end()
    (after,) = watcher.look(one, after=3.0)
    assert watcher.weighed == [one.pid]
    assert after.used - before.used == near(SIZE // 2)
    watcher.look(one, after=3.0)
    assert watcher.weighed == []


def test_whoever_comes_changes_it_for_who_waits_for_memory(start: Start, weights: str, watcher: Watcher) -> None:
    one = start(weights)
    alone = watcher.look(one, thorough=True)[0]
    other = start(weights)
    assert watcher.look(one, other)[0].used == alone.used
    assert watcher.look(one, other, thorough=True)[0].used == near(alone.used - SIZE // 2)
    watcher.look(one, other, thorough=True, after=0.1)
    assert watcher.weighed == []  # it has not moved since


def test_forked_workers_count_once(start: Start, watcher: Watcher) -> None:
    program = start()
    program.grow()
    alone = watcher.look(program, thorough=True)[0]
    child = program.fork()
    assert watcher.look(program, after=0.1)[0].alone  # not walked yet
    family = watcher.look(program, busy=BUSY, after=2.0)[0]
    assert watcher.walked == [program.pid]
    assert not family.alone
    assert family.resident > alone.resident + 0.9 * SIZE
    family = watcher.look(program, thorough=True)[0]
    assert family.used == family.needed == near(alone.used)
    os.kill(child, signal.SIGKILL)
    while procfs.is_running(child):  # its pages stay shared for a while when they are no longer shown
        pass
    left = watcher.look(program, thorough=True, after=3.0)[0]
    assert left.used == near(alone.used)


def test_who_is_on_its_way_out_is_weighed_with_again(
    start: Start, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = start()
    program.grow()
    child = program.fork()
    seen = procfs.glance
    with monkeypatch.context() as patch:  # the kernel's moment between showing no pages and having let go of them
        patch.setattr(procfs, "glance", lambda pid: (0, False) if pid == child else seen(pid))
        watcher.look(program, thorough=True)
        assert watcher.weighed == [program.pid]
        assert watcher.observer.doubtful
    watcher.look(program, after=3.0)  # nobody asks
    assert watcher.weighed == [program.pid]
    assert not watcher.observer.doubtful


def test_a_worker_that_outlives_its_runner_is_weighed_with_until_it_is_gone(
    start: Start, weights: str, watcher: Watcher
) -> None:
    one, other = start(weights), start(weights)
    worker = other.fork()
    before = watcher.look(one, other, busy=BUSY, after=3.0)[0]
    before = watcher.look(one, other, thorough=True, after=3.0)[0]
    other.end_alone()
    (between,) = watcher.look(one, after=3.0)
    assert watcher.weighed == [one.pid]  # who has gone may have shared pages with it; its worker does still
    assert between.used == near(before.resident - SIZE // 2)
    watcher.look(one, after=3.0)
    assert watcher.weighed == []
    os.kill(worker, signal.SIGKILL)
    while procfs.is_running(worker):
        pass
    (after,) = watcher.look(one, after=3.0)
    assert watcher.weighed == [one.pid]
    assert after.used == near(before.resident)
    assert watcher.observer.leaving == {}


def test_what_is_weighed_beside_who_is_leaving_is_weighed_again(
    start: Start, weights: str, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = start(weights), start(weights)
    worker = other.fork()
    watcher.look(one, other, busy=BUSY, thorough=True, after=3.0)
    other.end_alone()
    seen = procfs.glance
    with monkeypatch.context() as patch:  # the kernel's moment between showing no pages and having let go of them
        patch.setattr(procfs, "glance", lambda pid: (0, False) if pid == worker else seen(pid))
        watcher.look(one, after=3.0)
        assert watcher.weighed == [one.pid]
        assert watcher.observer.doubtful
    watcher.look(one, after=3.0)  # it has its memory, and no less of it
    assert watcher.weighed == [one.pid]
    assert not watcher.observer.doubtful


def test_nobody_waits_for_a_later_process_of_a_number(start: Start, weights: str, watcher: Watcher) -> None:
    one = start(weights)
    watcher.look(one, thorough=True)
    found = footprint.study((), [one.pid], {one.pid: "1"})
    assert (found.gone, found.unsettled) == ([one.pid], set())
    assert watcher.observer.leaving == {}


def test_what_outgrew_its_reservation_is_weighed_before_that_is_said(start: Start, weights: str) -> None:
    watcher = Watcher(reserved=SIZE * 3 // 4)
    try:
        one, other = start(weights), start(weights)
        sights = watcher.look(one, other)
        assert watcher.weighed == [one.pid, other.pid]
        assert all(sight.used < watcher.reserved < sight.resident for sight in sights)
        one.grow()
        watcher.look(one, other, after=0.5)
        assert watcher.weighed == []  # a moment ago
        watcher.look(one, other, after=2.0)
        assert watcher.weighed == [one.pid]
    finally:
        watcher.observer.close()


def test_trees_are_walked_often_where_something_happens_and_seldom_elsewhere(start: Start, watcher: Watcher) -> None:
    program = start()
    watcher.now = 3000.0

    def walks(seconds: int, *, busy: bool) -> int:
        count = 0
        for _ in range(seconds):
            watcher.look(program, busy=busy)
            count += len(watcher.walked)
        return count

    watcher.look(program)
    assert walks(59, busy=IDLE) == 2
    assert walks(60, busy=BUSY) == 30


def test_one_that_cannot_be_weighed_is_asked_once(
    start: Start, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = start()
    monkeypatch.setattr(procfs, "proportional", lambda _: None)
    for expected in ([program.pid], [], []):
        (sight,) = watcher.look(program, thorough=True, after=3.0)
        assert watcher.weighed == expected
        assert sight.used == sight.resident > MIB


def test_of_the_dead_nothing_is_left(start: Start, watcher: Watcher) -> None:
    program = start()
    assert watcher.look(program, thorough=True)[0].used > MIB
    program.end()
    (sight,) = watcher.look(program, thorough=True)
    assert (sight.resident, sight.used, sight.stopped) == (0, 0, False)


def test_weighing_is_what_the_system_s_own_library_says(start: Start, weights: str) -> None:
    one, other = start(weights), start(weights)
    for program in (one, other):
        found = procfs.proportional(program.pid)
        assert found == pytest.approx(psutil.Process(program.pid).memory_full_info().pss, abs=MIB)


def test_what_is_lost_was_shared_like_the_rest() -> None:
    part = Part(proportional=50, resident=100)
    assert [part.now(resident) for resident in (0, 50, 100, 130)] == [0, 25, 50, 80]


class Rusage:
    """macOS's answer, scripted."""

    def __init__(self, result: int) -> None:
        self.result = result

    def __call__(self, pid: int, flavor: int, info: object) -> int:
        assert (pid, flavor) == (7, 0)
        info._obj.ri_resident_size = 3 * MIB  # type: ignore[attr-defined]
        info._obj.ri_phys_footprint = 5 * MIB  # type: ignore[attr-defined]
        return self.result


def test_the_footprint_of_macos_is_read_where_the_headers_have_it() -> None:
    assert libproc.RusageInfo.ri_phys_footprint.offset == 72
    assert libproc.footprint(7, ask=Rusage(0)) == 5 * MIB
    assert libproc.footprint(7, ask=Rusage(-1)) == 0
    assert libproc.footprint(os.getpid()) == 0 or not LINUX
