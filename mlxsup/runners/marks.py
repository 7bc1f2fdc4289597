"""Finding processes that a runner left behind: by their group, and by the mark in their environment.

Every runner is started with `MLXSUP_RUNNER=<mark>`; what it forks inherits that, even with a session of its own. A process
that clears its environment is out of reach of the mark, and so is, on macOS, one that runs a program of Apple's own (/bin/sh,
/bin/sleep): the system hides the environment of those.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from mlxsup.runners import procfs

MARK = "MLXSUP_RUNNER"
"""The environment variable that carries a runner's mark: `<supervisor>.<runner>`, both random."""

SUPERVISOR_PID = "MLXSUP_SUPERVISOR_PID"
"""Tells a runner whose end it should not outlive; ours look whether that is still their parent."""


def marked(mark: str) -> list[int]:
    """Return the pids of living processes whose mark starts with `mark`.

    Linux tells by /proc, macOS by KERN_PROCARGS2, which psutil reads (never run there by us). Takes some milliseconds: call
    it off the loop.
    """
    if not procfs.AVAILABLE:
        return _marked_by_psutil(mark)
    needle = f"\0{MARK}={mark}".encode()
    return [pid for pid in procfs.processes() if needle in procfs.environment(pid) and procfs.is_running(pid)]


def group_members(pgid: int) -> list[int]:
    """Return the living (not zombie) members of a process group; call it off the loop.

    Without /proc the leader's pid stands for all of them.
    """
    try:
        os.killpg(pgid, 0)
    except (ProcessLookupError, PermissionError):  # macOS: PermissionError of a group that has only zombies left
        return []
    if not procfs.AVAILABLE:
        return [pgid]
    return [pid for pid in procfs.processes() if procfs.group(pid) == pgid and procfs.is_running(pid)]


def supervisor_of(pid: int) -> int | None:
    """Return the pid of the supervisor that started a marked process, None where that cannot be seen."""
    name = f"\0{SUPERVISOR_PID}=".encode()
    value = procfs.environment(pid).partition(name)[2].partition(b"\0")[0]
    return int(value) if value.isdigit() else None


def _marked_by_psutil(mark: str) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, SystemError):  # its extension for macOS raises the latter two by mistake
            if process.environ().get(MARK, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def kill(pids: list[int]) -> None:
    """SIGKILL each of `pids`; those already gone are fine."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
