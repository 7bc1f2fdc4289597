"""The GPU of Apple silicon: how much of the one memory it may hold, asked of sysctl; MLX and Metal stay out of this process.

Written from published measurements and tested with recorded answers; no machine of that kind has run it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Final

from mlxsup.host.device import MINIMUM, Device, Found

Sysctl = Callable[[str], str | None]
"""The value of one key as text, None where there is no such key."""

_MIB: Final = 1024**2
_SMALL: Final = 36 * 1024**3
"""Macs up to this size hold less back for the GPU."""


def find(*, available: int, sysctl: Sysctl | None = None) -> Found:
    """Return the Metal device, or why there is none.

    Args:
        available: bytes of RAM that are available now: the GPU's share is not set apart, so no more than that is free.
        sysctl: how to ask, for tests.
    """
    ask = sysctl or run_sysctl
    if (ask("hw.optional.arm64") or "").strip() != "1":
        return Found(reasons=("no Metal: this Mac has no Apple silicon",))
    size = _natural(ask("hw.memsize"))
    if not size:
        return Found(reasons=("no Metal: sysctl does not tell hw.memsize",))
    total = working_set(size, wired_limit_mb=_natural(ask("iogpu.wired_limit_mb")))
    chip = (ask("machdep.cpu.brand_string") or "").strip()
    device = Device(
        name="metal",
        kind="metal",
        total=total,
        minimum=MINIMUM["metal"],
        free=max(0, min(total, available)),
        description=chip,
    )
    return Found((device,))


def working_set(memory: int, *, wired_limit_mb: int = 0) -> int:
    """Return the bytes that Metal lets the GPU hold: what `iogpu.wired_limit_mb` says, else the system's own share.

    The share is not documented. As Metal's recommendedMaxWorkingSetSize it was reported as 10.67 of 16 GiB and 21.33 of 32
    (two thirds), 48 of 64, 72 of 96 and 96 of 128 (three quarters). Later systems give more (about 107 of 128 GiB in macOS
    26, 27 of 36), so that this errs to the safe side.

    Args:
        memory: bytes of RAM, `hw.memsize`.
        wired_limit_mb: the setting in MiB; 0 is the system's way to say that nobody set it.
    """
    if wired_limit_mb > 0:
        return min(wired_limit_mb * _MIB, memory)
    return memory * 2 // 3 if memory <= _SMALL else memory * 3 // 4


def run_sysctl(key: str) -> str | None:
    """Ask the system; some milliseconds."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=2, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _natural(text: str | None) -> int:
    return int(text) if text and text.strip().isdecimal() else 0
