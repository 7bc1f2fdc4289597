"""What Linux tells of other processes in /proc; everything is empty or unknown elsewhere and for what is gone.

Written here and not asked of psutil because the sentinel must stay small, and because psutil reads the whole table of
connections where one line of it is wanted. Calls that look at every process take milliseconds: make them off the loop.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from mlxsup.shortages import is_shortage

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTENING = re.compile(rb"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) [0-9A-F:]+ 0A(?: +\S+){5} +(\d+)", re.MULTILINE)
_PSS = re.compile(rb"^Pss: +(\d+) kB$", re.MULTILINE)

AVAILABLE = os.path.isdir("/proc/self/fd")
"""Whether this system has Linux's /proc."""

HAS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
"""Whether the kernel lists the children of each process; some are built without it (CONFIG_PROC_CHILDREN)."""


def processes() -> list[int]:
    """Return all pids."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()] if AVAILABLE else []


def environment(pid: int) -> bytes:
    r"""Return a process's first environment as `\0NAME=value\0...`; b"" when it is gone or not ours to read.

    Raises:
        OSError: we are out of descriptors, which says nothing of that process.
    """
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError as error:
        if is_shortage(error):
            raise
        return b""


def start_time(pid: int) -> str:
    """Return what tells a process from a later one with its pid: its start in clock ticks, "" where unknown."""
    with suppress(OSError):
        return _stat(pid, 19)
    return ""


def group(pid: int) -> int:
    """Return a process's group, -1 where unknown.

    Raises:
        OSError: we are out of descriptors.
    """
    return int(_stat(pid, 2) or -1)


def is_running(pid: int) -> bool:
    """Tell whether the process exists and is no zombie.

    Raises:
        OSError: we are out of descriptors.
    """
    return _stat(pid, 0) not in ("", "Z", "X")


def glance(pid: int) -> tuple[int, bool]:
    """Return a process's resident bytes and whether a signal or a debugger has stopped it; (0, False) when it is gone."""
    with suppress(OSError):
        return _seen(_fields(pid))
    return 0, False


class Glass:
    """A process to be glanced at every second: its line in /proc is kept open, so that no later process of that pid is taken for it.

    One look takes a third of the time that `glance` does. `close` it in the end.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._file = -1
        self._line = b""
        self._last = (0, False)

    def look(self) -> tuple[int, bool]:
        """Return what `glance` does."""
        if self._file < 0:
            try:
                self._file = os.open(f"/proc/{self._pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return 0, False
        try:
            line = os.pread(self._file, 4096, 0)
        except OSError:  # it is gone
            return 0, False
        if line != self._line:  # who does nothing has the same one for minutes
            self._line, self._last = line, _seen(_after_name(line))
        return self._last

    def close(self) -> None:
        """Let go of the line."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def proportional(pid: int) -> int | None:
    """Return a process's proportional set size: each page divided by the number of processes that have it; None if not told.

    The kernel looks at every page for it, some milliseconds for each GiB.
    """
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def tree(pid: int) -> list[int]:
    """Return the pid itself and those of all that came from it, each behind its parent."""
    table = None if HAS_CHILDREN else _by_parent()
    found, seen = [pid], {pid}
    for member in found:  # it grows meanwhile
        for child in children(member) if table is None else table.get(member, []):
            if child not in seen:  # pids that are used again may make a ring
                seen.add(child)
                found.append(child)
    return found


def children(pid: int) -> list[int]:
    """Return the pids of a process's children; one whose parent thread ends meanwhile may be there twice."""
    if not HAS_CHILDREN:
        return _by_parent().get(pid, [])
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):  # a thread may end meanwhile
                found += map(int, _text(f"/proc/{pid}/task/{thread}/children").split())
    return found


def listening_inodes(port: int) -> list[str]:
    """Return the inodes of the sockets that listen on a TCP port, on any address of this network namespace.

    IPv6 is looked at only when IPv4 has none: the kernel takes some milliseconds to write either table.
    """
    wanted = b"%04X" % port
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):  # /proc/net may be hidden (ProcSubset=pid)
        try:
            lines = _LISTENING.finditer(Path(table).read_bytes())
        except OSError:
            continue
        if found := [line[2].decode() for line in lines if line[1] == wanted]:
            return found
    return []


def holds_socket(pid: int, inodes: list[str]) -> bool:
    """Tell whether a process has one of these sockets open; False when we may not know.

    Raises:
        OSError: we are out of descriptors, which says nothing of that process.
    """
    wanted = {f"socket:[{inode}]" for inode in inodes}
    folder = f"/proc/{pid}/fd"
    try:
        return any(_link(f"{folder}/{name}") in wanted for name in os.listdir(folder))
    except OSError as error:
        if is_shortage(error):
            raise
        return False


def _by_parent() -> dict[int, list[int]]:
    """The children of each process; looks at all of them."""
    found: dict[int, list[int]] = {}
    for pid in processes():
        with suppress(OSError):
            if fields := _fields(pid):
                found.setdefault(int(fields[1]), []).append(pid)
    return found


def _text(path: str) -> bytes:
    """Read a list whole: the kernel hands it out in pieces of a page, in each as many whole entries as go into it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = part = os.read(file, 4096)
        while len(part) > 4000:
            part = os.read(file, 4096)
            found += part
        return found
    finally:
        os.close(file)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _stat(pid: int, index: int) -> str:
    """A field of /proc/PID/stat, counted from the one after the command's name: 0 state, 1 parent, 2 group, 19 start time."""
    fields = _fields(pid)
    return fields[index].decode() if fields else ""


def _seen(fields: list[bytes]) -> tuple[int, bool]:
    return (int(fields[21]) * _PAGE, fields[0] in (b"T", b"t")) if fields else (0, False)


def _fields(pid: int) -> list[bytes]:
    """Read /proc/PID/stat, without the layers of a file object: it is done often."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):
            raise
        return []
    try:
        return _after_name(os.read(file, 4096))
    except OSError:
        return []
    finally:
        os.close(file)


def _after_name(line: bytes) -> list[bytes]:
    """The fields after the command's name, which may have any character in it."""
    return line.rpartition(b")")[2].split()
