"""Whether the one who listens on a runner's port is that runner."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

import psutil

from mlxsup.engines import Address
from mlxsup.runners import marks, procfs


class Owner(enum.Enum):
    """Who listens on a port."""

    OURS = "ours"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


def owner(address: Address, pid: int, mark: str) -> Owner:
    """Tell whether the listener on a loopback port belongs to the tree of `pid`, its group, or who carries its mark.

    Takes a millisecond when the child itself listens, some more when it is somebody else: call it off the loop. A unix
    socket in our own folder needs no check. Without /proc a stranger cannot be told from what we may not see: UNKNOWN.
    """
    holds = _holder_test(address.port)
    if any(holds(member) for member in _family(pid, mark)):
        return Owner.OURS
    return Owner.STRANGER if any(holds(other) for other in procfs.processes()) else Owner.UNKNOWN


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


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    listeners = [found.laddr for found in connections if found.status == psutil.CONN_LISTEN]
    return any(getattr(address, "port", None) == port for address in listeners)
