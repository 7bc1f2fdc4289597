"""Keeps the daemon's memory from growing with its age: all threads share one heap."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_M_ARENA_MAX = -8
"""As `malloc.h` of glibc has it."""


def share_one() -> None:
    """Have glibc's malloc use one heap for all threads, unless MALLOC_ARENA_MAX says otherwise; to be called before there are any.

    By default each thread has one of its own, and what one thread frees lies in holes that the others do not fill: some MiB
    after some thousand runners. Threads here take turns anyway, so nobody waits for the lock.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
