"""What a runner looks like from outside: the memory of its process and of all that came from it, and whether it is stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import psutil

from mlxsup.runners import procfs

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class Sight(msgspec.Struct, frozen=True):
    """One look at a runner: resident bytes of its tree, and whether its process is stopped (SIGSTOP, a debugger)."""

    resident: int
    stopped: bool


class Observer:
    """Looks at the same processes again and again, once a second: who belongs to each is asked only now and then.

    Call it off the loop, from one thread at a time.
    """

    REGROUP = 5
    """Every so many looks the trees are walked anew; in between a new grandchild does not count yet."""

    def __init__(self) -> None:
        self._trees: dict[int, list[int]] = {}
        self._looks = 0

    def look(self, pids: Iterable[int]) -> list[Sight]:
        """Look at the tree below each pid; one that is gone has no memory and is not stopped."""
        if not procfs.AVAILABLE:
            return [_look_by_psutil(pid) for pid in pids]
        known = self._trees if self._looks % self.REGROUP else {}
        self._looks += 1
        self._trees = {pid: known.get(pid) or list(_tree(pid)) for pid in pids}
        return [self._sight(pid, tree) for pid, tree in self._trees.items()]

    def members(self, pid: int) -> list[int]:
        """Return the tree below a pid as it was at the last look."""
        return self._trees.get(pid, [pid])

    @staticmethod
    def _sight(pid: int, tree: list[int]) -> Sight:
        resident, stopped = procfs.glance(pid)
        return Sight(resident + sum(procfs.glance(member)[0] for member in tree if member != pid), stopped)


def measure(pid: int) -> int:
    """Return the resident bytes of the tree below `pid`, 0 when it is gone.

    Pages that several of its processes share count once for each. Reads some small files: call it off the loop.
    """
    if procfs.AVAILABLE:
        return sum(procfs.glance(member)[0] for member in _tree(pid))
    try:
        root = psutil.Process(pid)
        return sum(_resident(member) for member in (root, *root.children(recursive=True)))
    except psutil.Error:
        return 0


def _look_by_psutil(pid: int) -> Sight:
    try:
        return Sight(measure(pid), psutil.Process(pid).status() in _STOPPED)
    except psutil.Error:
        return Sight(0, stopped=False)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in procfs.children(pid):
        yield from _tree(child)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
