"""The little process that outlives a SIGKILL of its supervisor and cleans up after it.

It reads orders from a pipe on its standard input, one a line: `watch PGID START`, `forget PGID`, `ping`, `bye`; to a ping it
says that it is there. When the pipe or the supervisor ends without `bye`, every watched group, and every process with the supervisor's mark, gets SIGKILL, and
the folder of sockets is removed. It imports as little as it can: it lives as long as the daemon.
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
        with suppress(OSError):  # no descriptors left in the whole system: nothing is known then
            left = marks.marked(mark)
            marks.kill(left)
            if not left and not any(marks.group_members(pgid) for pgid in groups):
                break
        time.sleep(PAUSE)
    with suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def main() -> None:
    """Serve the supervisor at the other end of standard input; arguments: its mark, its folder of sockets, its pid."""
    mark, folder, supervisor = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, str] = {}
    for order in _orders(supervisor):
        verb, *words = order.split()
        if verb == "watch":
            groups[int(words[0])] = words[1]
        elif verb == "forget":
            groups.pop(int(words[0]), None)
        elif verb == "ping":
            with suppress(OSError):  # the supervisor has just died
                os.write(1, b"here\n")
        elif verb == "bye":
            return
    _clean_up(groups, mark, folder)


def _orders(supervisor: int) -> Iterator[str]:
    """The orders until the pipe ends or the supervisor does: a child it forked may hold the pipe open for longer."""
    watched = [0]
    with suppress(AttributeError, OSError):  # no pidfd on this system, or the supervisor is gone already
        watched.append(os.pidfd_open(supervisor))
    os.set_blocking(0, False)
    rest = b""
    while True:
        ready, _, _ = select.select(watched, [], [])
        with suppress(BlockingIOError):
            block = os.read(0, 65536)
            *lines, rest = (rest + block).split(b"\n")
            yield from (line.decode() for line in lines)
            if not block:
                return
            continue
        if ready != [0]:
            return
