"""What makes a spawn the same on asyncio's own loop and on uvloop, and its failures the errors that callers see."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from mlxsup.errors import EngineUnavailable, LoadFailed

SPAWN_DESCRIPTORS = 16
"""Descriptors that a spawn may need at once, on either loop."""

_TEXT_LOOK = 512
_PERMANENT = frozenset(
    (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.ENAMETOOLONG)
)
_REASONS = {
    errno.ENOENT: "no such file",
    errno.EACCES: "not executable",
    errno.ENOEXEC: "not a program for this machine",
    errno.EMFILE: "this process has no descriptors left (ulimit -n)",
    errno.ENFILE: "the system has no descriptors left",
    errno.EAGAIN: "the system has no room for another process (ulimit -u)",
    errno.ENOMEM: "the system has no memory for another process",
}


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


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/dev/fd") if name.isdecimal()]


def _is_inheritable(fd: int) -> bool:
    with suppress(OSError):  # the one by which the folder was read
        return os.get_inheritable(fd)
    return False


def spawn_error(program: str, error: OSError | ValueError, cwd: str | None = None) -> LoadFailed:
    """Turn a failed spawn into the error a caller sees."""
    number = error.errno if isinstance(error, OSError) else None
    permanent = number in _PERMANENT or isinstance(error, ValueError)
    why = _REASONS.get(number or 0) or getattr(error, "strerror", None) or str(error)
    what = program
    if cwd is not None and number in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir(cwd):
        what, why = f"{program} in {cwd}", "no such folder"
    kind = EngineUnavailable if permanent else LoadFailed
    return kind(f"cannot start {what}: {why}", details={"permanent": permanent, "stage": "spawn", "errno": number})
