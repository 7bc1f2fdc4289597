"""Tells systemd how the daemon is doing: the whole of sd_notify that a `Type=notify` service needs, and its watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send `READY=1`, `STOPPING=1` and the like to the service manager, if there is one; never fails, never blocks."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(), address)


def watchdog_limit() -> float:
    """Return the seconds within which the service manager wants to hear of this process again and again; 0: it does not.

    Those of `WatchdogSec=` (sd_watchdog_enabled(3)); what is meant for another process does not count.
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    limit = os.environ.get("WATCHDOG_USEC", "")
    return int(limit) / 1e6 if limit.isascii() and limit.isdigit() else 0.0


async def report_life() -> None:
    """Tell the watchdog, if there is one, that the loop goes round, twice as often as it wants to hear it."""
    if limit := watchdog_limit():
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(limit / 2)
