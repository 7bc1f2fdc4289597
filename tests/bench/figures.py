"""What the tables share: how figures are written, and what the system tells of a process that is measured from outside."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil
from rich.table import Table

LINUX = sys.platform == "linux"
MIB = 1 << 20

__all__ = ["LINUX", "MIB", "Usage", "grid", "loop_name", "median", "ms", "peak", "quantile", "ratio", "watch_peak"]


def loop_name() -> str:
    """`asyncio` or `uvloop`, whichever runs."""
    return "uvloop" if type(asyncio.get_running_loop()).__module__.startswith("uvloop") else "asyncio"


def grid(title: str, caption: str, *headings: str) -> Table:
    """A table whose first column says what, and whose others have figures."""
    table = Table(title=title, caption=caption)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ms(seconds: Sequence[float]) -> str:
    """Their median in ms, the worst in brackets."""
    return f"{median(seconds) * 1000:.1f} ({max(seconds) * 1000:.1f})"


def ratio(other: float, ours: float) -> str:
    """How many times ours the other is."""
    return f"{other / ours:.1f} x" if ours > 0 else ""


class Usage:
    """What a process has used of the machine since this was made."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._began = time.monotonic()
        self._cpu = _cpu_seconds(pid)
        self._switches = _switches(pid)

    @property
    def seconds(self) -> float:
        """Time that has passed."""
        return time.monotonic() - self._began

    @property
    def cpu(self) -> float:
        """CPU seconds of all its threads."""
        return _cpu_seconds(self.pid) - self._cpu

    @property
    def switches(self) -> int:
        """Times that one of its threads was put on a core, those of threads that have ended left out."""
        return _switches(self.pid) - self._switches


def _cpu_seconds(pid: int) -> float:
    if LINUX:  # its CPU clock, whose number the kernel makes of the pid: psutil's figures come in steps of 10 ms
        return time.clock_gettime((~pid << 3) | 2)
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _switches(pid: int) -> int:
    if not LINUX:
        return int(psutil.Process(pid).num_ctx_switches().voluntary)
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            count += sum(int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line)
    return count


def watch_peak(pid: int) -> int:
    """Forget the process's highest resident memory so far; returns what it has now."""
    if LINUX:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return int(psutil.Process(pid).memory_info().rss)


def peak(pid: int) -> int:
    """The highest resident memory since `watch_peak`; where the system keeps none, what it has now."""
    if LINUX:
        status = Path(f"/proc/{pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return int(psutil.Process(pid).memory_info().rss)
