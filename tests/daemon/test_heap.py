"""That all threads share one heap, as the C library itself tells."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, threading
from mlxsup.daemon import heap
heap.share_one()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
met = threading.Barrier(4)
def take():
    libc.malloc(2000)
    met.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other heaps")
@pytest.mark.parametrize(("limit", "heaps"), [(None, 1), ("3", 3)])
def test_threads_share_one_heap_unless_told_otherwise(limit: str | None, heaps: int) -> None:
    env = {key: value for key, value in os.environ.items() if key != "MALLOC_ARENA_MAX"}
    env |= {"MALLOC_ARENA_MAX": limit} if limit else {}
    done = subprocess.run([sys.executable, "-c", HEAPS], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("<heap nr=") == heaps
