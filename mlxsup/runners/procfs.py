"""What Linux tells of other processes in /proc; everything is empty or unknown elsewhere and for what is gone.

Written here and not asked of psutil because the sentinel must stay small, and because psutil reads the whole table of
connections where one line of it is wanted. Calls that look at every process take milliseconds: make them off the loop.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")

AVAILABLE = os.path.isdir("/proc/self/fd")
"""Whether this system has Linux's /proc."""


def processes() -> list[int]:
    """Return all pids."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()] if AVAILABLE else []


def environment(pid: int) -> bytes:
    r"""Return a process's first environment as `\0NAME=value\0...`; b"" when it is gone or not ours to read."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def start_time(pid: int) -> str:
    """Return what tells a process from a later one with its pid: its start in clock ticks, "" where unknown."""
    return _stat(pid, 19)


def group(pid: int) -> int:
    """Return a process's group, -1 where unknown."""
    return int(_stat(pid, 2) or -1)


def is_running(pid: int) -> bool:
    """Tell whether the process exists and is no zombie."""
    return _stat(pid, 0) not in ("", "Z", "X")


def glance(pid: int) -> tuple[int, bool]:
    """Return a process's resident bytes and whether a signal or a debugger has stopped it; (0, False) when it is gone."""
    fields = _fields(pid)
    return (int(fields[21]) * _PAGE, fields[0] in (b"T", b"t")) if fields else (0, False)


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    except OSError:
        return found
    return found


def listening_inodes(port: int) -> list[str]:
    """Return the inodes of the sockets that listen on a TCP port, on any address of this network namespace.

    IPv6 is looked at only when IPv4 has none: the kernel takes some milliseconds to write either table.
    """
    line = re.compile(rb"^ *\d+: [0-9A-F]+:%04X [0-9A-F:]+ 0A(?: +\S+){5} +(\d+)" % port, re.MULTILINE)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            found = [match[1].decode() for match in line.finditer(Path(table).read_bytes())]
        except OSError:
            continue
        if found:
            return found
    return []


def holds_socket(pid: int, inodes: list[str]) -> bool:
    """Tell whether a process has one of these sockets open; False when we may not know."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    folder = f"/proc/{pid}/fd"
    try:
        return any(_link(f"{folder}/{name}") in wanted for name in os.listdir(folder))
    except OSError:
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _stat(pid: int, index: int) -> str:
    """A field of /proc/PID/stat, counted from the one after the command's name: 0 state, 2 group, 19 start time."""
    fields = _fields(pid)
    return fields[index].decode() if fields else ""


def _fields(pid: int) -> list[bytes]:
    """Read /proc/PID/stat, without the layers of a file object: it is done for each runner once a second."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return os.read(file, 4096).rpartition(b")")[2].split()
    except OSError:
        return []
    finally:
        os.close(file)
