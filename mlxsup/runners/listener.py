"""Where a runner listens, and whether the one who listens there is ours."""

from __future__ import annotations

import enum
import itertools
import os
import socket
from pathlib import Path

import psutil

from mlxsup.engines import Address
from mlxsup.runners import marks

_numbers = itertools.count(1)


class Owner(enum.Enum):
    """Who listens on a port."""

    OURS = "ours"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


def new_socket_address(folder: Path) -> Address:
    """Return a unix socket address in a private folder; the runner makes the socket."""
    return Address(socket=str(folder / f"{next(_numbers)}.sock"))


def new_port_address() -> Address:
    """Return a loopback port that is free now; the owner check catches whoever is quicker than our runner."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return Address(port=probe.getsockname()[1])


def owner(address: Address, pid: int, mark: str) -> Owner:
    """Tell whether the listener on a loopback port belongs to the tree of `pid` or carries its mark.

    Takes some milliseconds: call it off the loop. A unix socket in our own folder needs no check.
    """
    family = {pid, *_children(pid), *marks.group_members(pid)}
    if any(_listens(member, address.port) for member in family):
        return Owner.OURS
    if any(_listens(member, address.port) for member in set(marks.marked(mark)) - family):
        return Owner.OURS
    return _stranger(address.port)


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
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in connections)


def _stranger(port: int) -> Owner:
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, PermissionError):  # macOS: only root sees the connections of others
        return Owner.UNKNOWN
    pids = [found.pid for found in connections if found.status == psutil.CONN_LISTEN and found.laddr.port == port]
    known = [found for found in pids if found]
    return Owner.STRANGER if known else Owner.UNKNOWN


def remove_socket(address: Address) -> None:
    """Remove a dead runner's socket file."""
    if address.socket and os.path.exists(address.socket):
        os.unlink(address.socket)
