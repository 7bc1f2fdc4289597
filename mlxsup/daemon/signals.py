"""Signals as calls on the running loop, for a while: SIGINT and SIGTERM to end, SIGHUP to reload."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Final

OnSignal = Callable[[signal.Signals, int], None]

LEAVING: Final = 0.5
"""Seconds within which a terminal is gone whose shell says that it leaves."""


@contextlib.contextmanager
def captured(on_signal: OnSignal) -> Iterator[None]:
    """Call `on_signal(which, count)` for each SIGINT and SIGTERM, count from 1; put back on exit what was there before.

    A signal that is ignored stays ignored: that is how a shell keeps its background jobs from a Ctrl-C that is not for them.
    Only for the main thread.
    """
    loop = asyncio.get_running_loop()
    count = 0

    def received(which: signal.Signals) -> None:
        nonlocal count
        count += 1
        on_signal(which, count)

    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    heard = [which for which, handler in before.items() if handler is not signal.SIG_IGN]
    for which in heard:
        loop.add_signal_handler(which, received, which)
    try:
        yield
    finally:
        for which in heard:
            loop.remove_signal_handler(which)
            if before[which] is not None:  # None: somebody's C code, which Python cannot put back
                signal.signal(which, before[which])


@contextlib.contextmanager
def hangups(terminal_gone: Callable[[], None]) -> Iterator[asyncio.Event]:
    """Return an event that is set at each SIGHUP; one that is ignored, as under nohup, stays so. Only for the main thread.

    One that comes because our terminal is closed calls `terminal_gone` instead: whoever started us there has left. Of a shell that
    leaves it comes a moment before that.
    """
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        yield heard
        return
    terminals = [descriptor for descriptor in (0, 2) if os.isatty(descriptor)]

    def decide() -> None:
        if any(map(os.isatty, terminals)):
            heard.set()
        else:
            terminal_gone()

    def received() -> None:
        if terminals:
            loop.call_later(LEAVING, decide)
        else:
            heard.set()

    loop.add_signal_handler(signal.SIGHUP, received)
    try:
        yield heard
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        if before is not None:
            signal.signal(signal.SIGHUP, before)
