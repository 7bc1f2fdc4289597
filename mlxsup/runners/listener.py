"""Whether the one who listens on a runner's port is that runner."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator

import psutil

from mlxsup.engines import Address
from mlxsup.runners import marks, procfs
from mlxsup.shortages import is_shortage


class Owner(enum.Enum):
    """Who listens on a port."""

    OURS = "ours"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


def owner(address: Address, pid: int, mark: str) -> Owner:
    """Tell whether the listener on a loopback port belongs to the tree of `pid`, its group, or who carries its mark.

    Takes a millisecond when the child itself listens, some more when it is somebody else: call it off the loop. A unix
    socket in our own folder needs no check. UNKNOWN is whom we may not look at, as other users' processes.
    """
    holds = _holder_test(address.port)
    if any(holds(member) for member in _family(pid, mark)):
        return Owner.OURS
    holder = next(filter(holds, procfs.processes() if procfs.AVAILABLE else psutil.pids()), None)
    if holder is None:
        return Owner.UNKNOWN
    return Owner.OURS if _session(holder) == pid else Owner.STRANGER


def _holder_test(port: int) -> Callable[[int], bool]:
    """Return what tells whether a process holds the listener on `port`."""
    if not procfs.AVAILABLE:
        return lambda pid: _listens(pid, port)
    inodes = procfs.listening_inodes(port)
    return lambda pid: procfs.holds_socket(pid, inodes)


def _family(pid: int, mark: str) -> Iterator[int]:
    """The processes that belong to a runner, the likeliest to listen first, those hard to find last."""
    yield pid
    yield from _children(pid)
    yield from marks.group_members(pid)
    yield from marks.marked(mark)


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _session(pid: int) -> int:
    """A runner leads one of its own; without /proc this is all that tells of its orphans whose environment is hidden."""
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    except OSError as error:  # one that its extension for macOS does not know
        if is_shortage(error):
            raise
        return False
    listeners = [found.laddr for found in connections if found.status == psutil.CONN_LISTEN]
    return any(getattr(address, "port", None) == port for address in listeners)
