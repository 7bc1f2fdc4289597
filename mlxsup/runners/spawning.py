"""What makes a spawn the same on asyncio's own loop and on uvloop, and its failures the errors that callers see."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from mlxsup.errors import EngineUnavailable, LoadFailed, ResourceExhausted
from mlxsup.runners.pipes import on_uvloop
from mlxsup.shortages import is_shortage

log = logging.getLogger(__name__)

SPAWN_DESCRIPTORS = 16
"""Descriptors that a spawn may need at once, on either loop."""

_RESTORED = frozenset((signal.SIGPIPE, signal.SIGXFSZ))
"""What Python ignores itself, and `subprocess` does not let a child inherit."""
_TEXT_LOOK = 512
_PERMANENT = frozenset((errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.ENAMETOOLONG))
_OTHER_MACHINE = frozenset(("ENOEXEC", "EBADARCH", "EBADEXEC", "EBADMACHO"))
"""By name: macOS alone has the last three, and Linux their numbers with other meanings."""
_REASONS = {errno.ENOENT: "no such file", errno.EACCES: "not executable"}
_FOLDERS = ("/dev/fd", "/proc/self/fd")
_MOST_TRIED = 4096
_NO_ROOM = "the system has no room for another process (ulimit -u)"


def prepare(argv: Sequence[str], env: Mapping[str, str]) -> list[int]:
    """Refuse what uvloop would run otherwise, and return the descriptors that a child of it would inherit.

    It cuts an argument at a NUL, and gives a text without `#!` to a shell. Reads files: call it off the loop.

    Raises:
        ValueError, OSError: as a plain exec would fail.
    """
    _check_program(argv, env)
    return [fd for fd in _descriptors() if fd > 2 and _is_inheritable(fd)]


def _check_program(argv: Sequence[str], env: Mapping[str, str]) -> None:
    if any("\0" in part for part in argv):
        raise ValueError("an argument has a NUL byte")
    program = shutil.which(argv[0], path=env.get("PATH"))
    if program is None:
        return  # the spawn says why
    try:
        with open(program, "rb") as file:
            begin = file.read(_TEXT_LOOK)
    except OSError:  # one may run what one may not read
        return
    if not begin.startswith(b"#!") and b"\0" not in begin:
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC))


def require_descriptors() -> None:
    """Fail now if a spawn would run out of descriptors half-way: uvloop leaks those that it had opened by then.

    Raises:
        OSError: EMFILE or ENFILE.
    """
    with ExitStack() as opened:
        for _ in range(SPAWN_DESCRIPTORS):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


@contextmanager
def kept_private(inheritable: Sequence[int]) -> Iterator[None]:
    """Keep these descriptors of ours from a child that is started meanwhile: uvloop closes nothing there."""
    changed = []
    for fd in inheritable:
        with suppress(OSError):  # closed meanwhile
            os.set_inheritable(fd, False)
            changed.append(fd)
    try:
        yield
    finally:
        for fd in changed:
            with suppress(OSError):
                os.set_inheritable(fd, True)


def signals_reset() -> dict[str, Any]:
    """Return what has a child begin with no signal ignored or blocked, for `create_subprocess_exec`.

    A host that ignores SIGINT, as one that a script starts in the background, or blocks SIGTERM, would otherwise have runners
    that cannot be asked to stop. uvloop does so by itself. asyncio needs a function between fork and exec for it, and then
    cannot use vfork: only where something is ignored or blocked, which is rare.
    """
    if on_uvloop(asyncio.get_running_loop()) or not (signal.pthread_sigmask(signal.SIG_BLOCK, ()) or _ignored()):
        return {}
    return {"preexec_fn": _reset_signals}


def _ignored() -> list[int]:
    """The signals that this program ignores, but for those that `subprocess` takes care of."""
    return [number for number in signal.valid_signals() - _RESTORED if signal.getsignal(number) is signal.SIG_IGN]


def _reset_signals() -> None:
    for number in _ignored():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def warn_of_lost_ends() -> None:
    """Say so if the system will not tell how our children end; uvloop catches the signal for itself."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN and not on_uvloop(asyncio.get_running_loop()):
        log.warning(
            "SIGCHLD is ignored, so nobody can tell how a runner ended (all have exit code 255);"
            " before entering the Supervisor: signal.signal(signal.SIGCHLD, signal.SIG_DFL)"
        )


def _descriptors() -> Sequence[int]:
    """What is open, or may be: a bare chroot or jail lists it nowhere."""
    for folder in _FOLDERS:
        with suppress(FileNotFoundError, NotADirectoryError):
            return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return range(_MOST_TRIED if most == resource.RLIM_INFINITY else min(most, _MOST_TRIED))


def _is_inheritable(fd: int) -> bool:
    with suppress(OSError):  # the one by which the folder was read
        return os.get_inheritable(fd)
    return False


def spawn_error(
    program: str, error: OSError | ValueError, cwd: str | None = None
) -> EngineUnavailable | LoadFailed | ResourceExhausted:
    """Turn a failed spawn into the error a caller sees."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EAGAIN:
        return ResourceExhausted(f"cannot start {program}: {_NO_ROOM}", details={"stage": "spawn", "errno": number})
    if isinstance(error, OSError) and is_shortage(error):
        return ResourceExhausted.of(f"cannot start {program}", error, stage="spawn")
    elsewhere = errno.errorcode.get(number or 0) in _OTHER_MACHINE
    permanent = elsewhere or number in _PERMANENT or isinstance(error, ValueError)
    why = "not a program for this machine" if elsewhere else _REASONS.get(number or 0)
    why = why or getattr(error, "strerror", None) or str(error)
    what = program
    if cwd is not None and number in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir(cwd):
        what, why = f"{program} in {cwd}", "no such folder"
    kind = EngineUnavailable if permanent else LoadFailed
    return kind(f"cannot start {what}: {why}", details={"permanent": permanent, "stage": "spawn", "errno": number})
