"""The little process that outlives a SIGKILL of its supervisor and cleans up after it.

It reads orders from a pipe on its standard input, one a line: `watch PGID START`, `forget PGID`, `folder HEX`, `ping`, `bye`; to
a ping it says that it is there. When the pipe or the supervisor ends without `bye`, every watched group, and every process with
the supervisor's mark, gets SIGKILL, and the folder of sockets is removed. It imports as little as it can: it lives as long as the
daemon.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from mlxsup.runners import marks, procfs

ROUNDS = 40
PAUSE = 0.05
LOOK_EVERY = 0.5
"""Seconds between two looks whether the supervisor lives, where the system does not tell."""


def _end_group(pgid: int, started: str) -> None:
    leader = procfs.start_time(pgid)
    if leader and started not in ("", "-", leader):
        return  # the group we knew is gone and its number belongs to somebody else
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _clean_up(groups: dict[int, str], mark: str, folder: str) -> None:
    for _ in range(ROUNDS):
        for pgid, started in groups.items():
            _end_group(pgid, started)
        with suppress(Exception):  # no descriptors left in the whole system, no psutil: nothing is known then
            left = marks.marked(mark)
            marks.kill(left)
            if not left and not any(marks.group_members(pgid) for pgid in groups):
                break
        time.sleep(PAUSE)
    with suppress(OSError):
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove the folder if it is still ours: it may have been tidied away, and its name taken by somebody else."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(handle).st_uid == os.geteuid():
        for name in os.listdir(handle):
            os.unlink(name, dir_fd=handle)
        os.rmdir(folder)


def main() -> None:
    """Serve the supervisor at the other end of standard input; arguments: its mark, its folder of sockets, its pid."""
    mark, folder, supervisor = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not procfs.AVAILABLE:
        _import_psutil()
    groups: dict[int, str] = {}
    for order in _orders(supervisor):
        verb, *words = order.split()
        if verb == "watch":
            groups[int(words[0])] = words[1]
        elif verb == "forget":
            groups.pop(int(words[0]), None)
        elif verb == "folder":
            folder = os.fsdecode(bytes.fromhex(words[0]))
        elif verb == "ping":
            with suppress(OSError):  # the supervisor has just died
                os.write(1, b"here\n")
        elif verb == "bye":
            return
    _clean_up(groups, mark, folder)


def _import_psutil() -> None:
    """Have it before it is needed: by then its files may be gone, or be those of another version."""
    try:
        import psutil  # noqa: F401
    except (ImportError, OSError) as error:  # the groups are ended all the same
        os.write(1, f"marked processes will not be found: {error!r}\n".encode())


def _orders(supervisor: int) -> Iterator[str]:
    """The orders until the pipe ends or the supervisor does: a child it forked may hold the pipe open for longer."""
    ended = _end_of(supervisor)
    watched = [0] if ended is None else [0, ended]
    pause = LOOK_EVERY if ended is None else None
    os.set_blocking(0, False)
    rest = b""
    while True:
        ready, _, _ = select.select(watched, [], [], pause)
        with suppress(BlockingIOError):
            block = os.read(0, 65536)
            *lines, rest = (rest + block).split(b"\n")
            yield from (line.decode() for line in lines)
            if not block:
                return
            continue
        if ended in ready or (ended is None and os.getppid() != supervisor):
            return


def _end_of(supervisor: int) -> int | None:
    """A descriptor that can be read when the supervisor has ended; None where there is none, as on macOS, or no more."""
    try:
        return os.pidfd_open(supervisor)
    except (AttributeError, OSError):
        return None
