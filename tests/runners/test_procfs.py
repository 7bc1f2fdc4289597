"""What /proc tells of other processes is what the system's own library tells, and nothing of who is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlxsup.runners import footprint, procfs
from tests.waiting import LIMIT

from .children import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="Linux's /proc")

GONE = 2**22 + 5
FAMILY = """
import os, signal
held = bytearray(b"x") * (20 << 20)
reading, writing = os.pipe()
if os.fork() == 0:
    more = bytearray(b"y") * (30 << 20)
    os.write(writing, b"1")
    signal.pause()
os.read(reading, 1)
os.write(1, b"up\\n")
signal.pause()
"""


def _look(pid: int) -> footprint.Sight:
    (sight,) = footprint.Observer().look([pid])
    return sight


@pytest.fixture
def family() -> Iterator[psutil.Process]:
    """A process of 20 MiB with a child of 30 MiB more, and a name that is hard to parse."""
    argv = ["a (b) c) 1 2", "-I", "-S", "-c", FAMILY]
    with subprocess.Popen(argv, executable=sys.executable, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield psutil.Process(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_it_sees_the_same_tree(family: psutil.Process) -> None:
    assert procfs.children(family.pid) == [child.pid for child in family.children()]
    assert procfs.group(family.pid) == family.pid
    assert all(procfs.group(child) == family.pid for child in procfs.children(family.pid))
    assert {family.pid, os.getpid()} <= set(procfs.processes())


def test_the_memory_of_a_tree_is_that_of_all_its_members(family: psutil.Process) -> None:
    alone = procfs.glance(family.pid)[0]
    assert alone == pytest.approx(family.memory_info().rss, abs=1 << 20)
    assert 20 << 20 < alone < 60 << 20
    whole = footprint.measure(family.pid)
    assert whole == pytest.approx(alone + sum(child.memory_info().rss for child in family.children()), abs=1 << 20)
    assert whole > alone + (30 << 20)


def test_it_is_found_among_all_where_the_kernel_lists_no_children(
    family: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path("/proc/thread-self/children").exists() == procfs.HAS_CHILDREN
    tree, size = procfs.tree(family.pid), footprint.measure(family.pid)
    assert tree == [family.pid, *(child.pid for child in family.children())]

    def missing(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(procfs, "_text", missing)
    monkeypatch.setattr(procfs, "HAS_CHILDREN", False)
    assert procfs.tree(family.pid) == tree
    assert procfs.children(family.pid) == tree[1:]
    assert footprint.measure(family.pid) == pytest.approx(size, abs=1 << 20)
    assert procfs.tree(GONE) == [GONE]
    assert len(procfs.tree(os.getpid())) >= 3


def test_pids_that_are_used_again_meanwhile_make_no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "HAS_CHILDREN", True)
    monkeypatch.setattr(procfs, "children", {1: [2], 2: [3], 3: [1]}.__getitem__)
    assert procfs.tree(1) == [1, 2, 3]


def test_a_child_that_moves_to_another_thread_meanwhile_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "HAS_CHILDREN", True)
    monkeypatch.setattr(procfs, "children", {1: [2, 3, 2], 2: [], 3: [2]}.__getitem__)
    assert procfs.tree(1) == [1, 2, 3]


def test_a_kept_line_says_the_same_and_does_not_take_another_process_for_its_own(family: psutil.Process) -> None:
    glass, late = procfs.Glass(family.pid), procfs.Glass(GONE)
    try:
        assert glass.look() == procfs.glance(family.pid)
        assert glass.look()[0] > 20 << 20
        assert late.look() == (0, False)
        family.kill()
        os.waitid(os.P_PID, family.pid, os.WEXITED | os.WNOWAIT)
        assert glass.look() == (0, False)
        family.wait()
        assert glass.look() == (0, False)
    finally:
        glass.close()
        late.close()


def test_a_long_list_of_children_is_read_whole() -> None:
    program = """
import os, signal
for _ in range(900):
    if os.fork() == 0:
        signal.pause()
os.write(1, b"up\\n")
signal.pause()
"""
    argv = [sys.executable, "-I", "-S", "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            assert len(procfs.children(process.pid)) == 900
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_stopped_process_is_seen_as_such(family: psutil.Process) -> None:
    assert not _look(family.pid).stopped
    family.suspend()
    os.waitid(os.P_PID, family.pid, os.WSTOPPED)
    sight = _look(family.pid)
    assert sight.stopped
    assert sight.resident > 0
    family.resume()
    os.waitid(os.P_PID, family.pid, os.WCONTINUED)
    assert not _look(family.pid).stopped


def test_a_start_time_tells_two_processes_apart(family: psutil.Process) -> None:
    assert procfs.start_time(family.pid) == procfs.start_time(family.pid) != ""
    assert int(procfs.start_time(os.getpid())) <= int(procfs.start_time(family.pid))


def test_an_environment_is_found_at_the_beginning_of_its_variables(family: psutil.Process) -> None:
    found = procfs.environment(family.pid)
    assert found.startswith(b"\0")
    assert f"\0PATH={os.environ['PATH']}\0".encode() in found


def test_a_zombie_is_not_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not procfs.is_running(process.pid)
    assert footprint.measure(process.pid) == 0
    process.wait(LIMIT)


def test_of_who_is_gone_there_is_nothing() -> None:
    assert not procfs.is_running(GONE)
    assert procfs.children(GONE) == []
    assert (procfs.glance(GONE)[0], procfs.group(GONE)) == (0, -1)
    assert (procfs.environment(GONE), procfs.start_time(GONE)) == (b"", "")
    assert not procfs.holds_socket(GONE, ["1"])
    assert procfs.proportional(GONE) is None
    assert _look(GONE) == footprint.Sight(0, stopped=False)


def test_without_proc_it_is_asked_of_the_system(family: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = footprint.measure(family.pid)
    monkeypatch.setattr(procfs, "AVAILABLE", False)
    assert footprint.measure(family.pid) == pytest.approx(expected, abs=4 << 20)
    assert procfs.processes() == []
    assert _look(GONE) == footprint.Sight(0, stopped=False)
    family.suspend()
    os.waitid(os.P_PID, family.pid, os.WSTOPPED)
    assert _look(family.pid).stopped
