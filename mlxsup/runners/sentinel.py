"""The little process that outlives a SIGKILL of its supervisor and cleans up after it.

It reads orders from a pipe on its standard input, one a line: `watch PGID START`, `forget PGID`, `bye`. When the pipe ends
without `bye`, its supervisor is gone: every watched group, and every process with the supervisor's mark, gets SIGKILL, and
the folder of sockets is removed. It imports as little as it can: it lives as long as the daemon.
"""

from __future__ import annotations

import os
import signal
import sys
import time
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
    """Serve the supervisor at the other end of standard input; arguments: its mark, its folder of sockets."""
    mark, folder = sys.argv[1], sys.argv[2]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, str] = {}
    for line in sys.stdin:
        order, *words = line.split()
        if order == "watch":
            groups[int(words[0])] = words[1] if len(words) > 1 else ""
        elif order == "forget":
            groups.pop(int(words[0]), None)
        elif order == "bye":
            return
    _clean_up(groups, mark, folder)
