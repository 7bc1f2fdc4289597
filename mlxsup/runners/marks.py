"""Finding processes that a runner left behind: by their group, and by the mark in their environment.

Every runner is started with `MLXSUP_RUNNER=<mark>`; what it forks inherits that, even with a session of its own. A process
that clears its environment is out of reach of the mark.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

MARK = "MLXSUP_RUNNER"
"""The environment variable that carries a runner's mark: `<supervisor>.<runner>`, both random."""


def marked(mark: str) -> list[int]:
    """Return the pids of living processes whose mark starts with `mark`. Linux reads /proc; elsewhere the list is empty.

    Takes some milliseconds: call it off the loop.
    """
    needle = f"\0{MARK}={mark}".encode()
    found = []
    for name in _processes():
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = b"\0" + file.read()
        except OSError:  # gone, or not ours to read
            continue
        if needle in environment and _state(name) != "Z":
            found.append(int(name))
    return found


def group_members(pgid: int) -> list[int]:
    """Return the living (not zombie) members of a process group; call it off the loop."""
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return []
    except PermissionError:  # macOS says so of a group that has only zombies left
        return []
    members = [int(name) for name in _processes() if _group(name) == pgid and _state(name) != "Z"]
    return members if _has_proc() else [pgid]


def kill(pids: list[int]) -> None:
    """SIGKILL each of `pids`; those already gone are fine."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _has_proc() -> bool:
    return os.path.isdir("/proc/self")


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdecimal()] if _has_proc() else []


def _stat(name: str) -> list[str]:
    """The fields of /proc/PID/stat after the command's name: state, parent, group, ..."""
    try:
        with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _state(name: str) -> str:
    fields = _stat(name)
    return fields[0] if fields else "Z"


def _group(name: str) -> int:
    fields = _stat(name)
    return int(fields[2]) if fields else -1
