"""What a runner looks like from outside: the memory of its process and of all that came from it, and whether it is stopped."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import psutil

from mlxsup.runners import procfs


class Sight(msgspec.Struct, frozen=True):
    """One look at a runner: resident bytes of its tree, and whether its process is stopped (SIGSTOP, a debugger)."""

    resident: int
    stopped: bool


def look(pid: int) -> Sight:
    """Look at the tree below `pid`; a process that is gone has no memory and is not stopped. Call it off the loop."""
    if procfs.AVAILABLE:
        return Sight(measure(pid), procfs.is_stopped(pid))
    try:
        return Sight(measure(pid), psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return Sight(0, stopped=False)


def measure(pid: int) -> int:
    """Return the resident bytes of the tree below `pid`, 0 when it is gone.

    Pages that several of its processes share count once for each. Reads some small files: call it off the loop.
    """
    if procfs.AVAILABLE:
        return sum(procfs.resident(member) for member in _tree(pid))
    try:
        root = psutil.Process(pid)
        return sum(_resident(member) for member in (root, *root.children(recursive=True)))
    except psutil.Error:
        return 0


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in procfs.children(pid):
        yield from _tree(child)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
