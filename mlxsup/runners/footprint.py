"""How much memory a runner uses now: the resident memory of its process and of all that came from it."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from mlxsup.runners import procfs


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
