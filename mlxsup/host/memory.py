"""The devices of this machine, and its RAM: as /proc or /sys tells it, within the limits of control groups; by psutil on macOS.

Everything here reads files or asks drivers: call it off the loop.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from mlxsup.host import gpu_metal, gpu_nvidia
from mlxsup.host.cgroups import Limit, limits, read_now
from mlxsup.host.device import MINIMUM, Device, Found

_AVAILABLE: Final = b"MemAvailable:"
_LINE = re.compile(r"^(?:Node \d+ )?([\w()]+): +(\d+) kB$", re.MULTILINE)
_HIDDEN: Final = (FileNotFoundError, PermissionError)
_NODES: Final = "sys/devices/system/node/node*/meminfo"
_GIVEN_BACK: Final = ("Active(file)", "Inactive(file)", "SReclaimable")
"""What is about what the kernel calls available beside what is free; of a node it does not tell that itself."""
_CPU: Final = "cpu"


def devices(*, platform: str = sys.platform, root: Path = Path("/")) -> Found:
    """Return the devices of this machine: its NVIDIA cards first, or Metal, then "cpu".

    On Apple silicon RAM and GPU memory are one, so Metal stands for both and there is no "cpu" beside it.

    Args:
        platform: as in `sys.platform`, for tests.
        root: where /proc, /sys and /dev are looked for, for tests.
    """
    found = ram(root=root)
    if platform == "darwin":
        metal = gpu_metal.find(available=found.devices[0].free)
        return metal if metal.devices else metal + found
    return gpu_nvidia.find(root=root) + found


def home() -> Device:
    """Return the device of a runner that names none: Metal on a Mac that has it, else the RAM."""
    return devices().devices[0] if sys.platform == "darwin" else ram().devices[0]


def ram(*, root: Path = Path("/")) -> Found:
    """Return the RAM as the device "cpu".

    Its total is the machine's or the smallest limit of a control group above us; free is what the kernel calls available, or
    less where a group has less left.

    Args:
        root: where /proc and /sys are looked for, for tests.
    """
    groups, reasons = limits(root)
    try:
        facts = _facts(read_now(str(root / "proc/meminfo")))
    except _HIDDEN:
        if sys.platform != "linux":
            return Found((_by_psutil(),))
        total, free = _without_meminfo(root)
    else:
        if "MemTotal" not in facts:
            return Found((_by_psutil(),), (f"{root / 'proc/meminfo'}: no MemTotal in it",))
        total, free = facts["MemTotal"], facts.get("MemAvailable", facts.get("MemFree", 0))
    for group in groups:
        total = min(total, group.limit)
        free = min(free, max(0, group.limit - group.used))
    return Found((_ram(total, free),), tuple(reasons))


class Gauge:
    """What is free of the RAM, for Linux and for every second: which limits hold for us is looked up once in a while.

    `survey` takes a few hundred microseconds, `free` a few dozen.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        """Take the machine's memory, without any limits before the first survey; `root` is for tests."""
        self._root = root
        self._meminfo = str(root / "proc/meminfo")
        self._limits: tuple[Limit, ...] = ()

    def survey(self) -> None:
        """Look up the limits that hold for us now."""
        self._limits = tuple(limit for limit in limits(self._root)[0] if limit.usage)

    def free(self) -> int:
        """Return the bytes that are free, as `ram` does; groups that are gone are left out until the next survey.

        Raises:
            OSError: the system does not tell just now.
        """
        try:
            free = _available(read_now(self._meminfo))
        except _HIDDEN:
            free = _without_meminfo(self._root)[1]
        for limit in self._limits:
            with suppress(OSError, ValueError):
                free = min(free, max(0, limit.left(free)))
        return free


def _available(meminfo: bytes) -> int:
    """Pick one line: a regular expression over all of them takes ten times as long."""
    at = meminfo.find(_AVAILABLE)
    if at < 0:  # kernels before 3.14
        return _facts(meminfo).get("MemFree", 0)
    return 1024 * int(meminfo[at + len(_AVAILABLE) : meminfo.index(b"k", at)])


def _facts(meminfo: bytes) -> Mapping[str, int]:
    return {name: 1024 * int(size) for name, size in _LINE.findall(meminfo.decode("ascii"))}


def _without_meminfo(root: Path) -> tuple[int, int]:
    """Return the total and what is available, where /proc has nothing but processes (ProcSubset=pid).

    The system says what nobody uses for anything, and the nodes in /sys, where there are any, what it would give back.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    for node in root.glob(_NODES):
        facts = _facts(read_now(str(node)))
        free += sum(facts.get(name, 0) for name in _GIVEN_BACK)
    return total, min(free, total)


def _by_psutil() -> Device:
    import psutil  # 20 ms that Linux does not need

    found = psutil.virtual_memory()
    return _ram(found.total, found.available)


def _ram(total: int, free: int) -> Device:
    return Device(name=_CPU, kind="cpu", total=total, minimum=MINIMUM["cpu"], free=min(free, total))
