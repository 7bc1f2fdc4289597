"""What this program or its machine can run out of, told apart from the faults of others."""

from __future__ import annotations

import errno

_WORDS = {
    errno.EMFILE: "this process has no descriptors left (ulimit -n)",
    errno.ENFILE: "the system has no descriptors left (sysctl fs.file-max)",
    errno.ENOMEM: "the system has no memory for it",
    errno.ENOBUFS: "the system has no memory for network buffers",
}


class NoThreadError(RuntimeError):
    """There is no thread to be had, which Python says by an error that means anything."""


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says only that we are out of something: nothing about whom we asked."""
    return isinstance(error, NoThreadError) or (isinstance(error, OSError) and error.errno in _WORDS)


def describe_shortage(error: BaseException) -> str:
    """Say what there is too little of, and how to have more of it."""
    return _WORDS.get(getattr(error, "errno", 0)) or str(error)
