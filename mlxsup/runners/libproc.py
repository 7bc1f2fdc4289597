"""What macOS tells of a process in its own library: the memory that Activity Monitor shows, the GPU's part of it included.

Written from the published headers and tested with a scripted library; no Mac has run it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

_PATH: Final = "/usr/lib/libproc.dylib"
_FLAVOR: Final = 0
"""RUSAGE_INFO_V0, the oldest form of the answer: it has all that is wanted."""

Usage = Callable[[int, int, Any], int]
"""proc_pid_rusage: a pid, a flavor, where to write the answer; 0 when it was written."""


class RusageInfo(ctypes.Structure):
    """`struct rusage_info_v0` of <sys/resource.h>."""

    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("ri_user_time", ctypes.c_uint64),
        ("ri_system_time", ctypes.c_uint64),
        ("ri_pkg_idle_wkups", ctypes.c_uint64),
        ("ri_interrupt_wkups", ctypes.c_uint64),
        ("ri_pageins", ctypes.c_uint64),
        ("ri_wired_size", ctypes.c_uint64),
        ("ri_resident_size", ctypes.c_uint64),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("ri_proc_start_abstime", ctypes.c_uint64),
        ("ri_proc_exit_abstime", ctypes.c_uint64),
    )


def footprint(pid: int, *, ask: Usage | None = None) -> int:
    """Return a process's physical footprint in bytes; 0 elsewhere than on macOS, and for what is gone.

    Args:
        pid: of the process.
        ask: how to ask, for tests.
    """
    usage = ask or _library()
    if usage is None:
        return 0
    info = RusageInfo()
    return int(info.ri_phys_footprint) if usage(pid, _FLAVOR, ctypes.byref(info)) == 0 else 0


@lru_cache(maxsize=1)
def _library() -> Usage | None:
    try:
        found: Usage = ctypes.CDLL(_PATH).proc_pid_rusage
    except (OSError, AttributeError):  # no such library elsewhere
        return None
    return found
