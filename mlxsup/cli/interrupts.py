"""Runs a command's coroutine so that Ctrl-C and SIGTERM end it in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from mlxsup.cli.failures import say
from mlxsup.daemon.signals import captured


def run(command: Coroutine[Any, Any, int]) -> int:
    """Run `command` on a loop of its own and return its exit code, or 128 + n when signal n ended it.

    Each signal cancels the command: the first ends its work, a second what its clean-up still waits for.
    """
    with asyncio.Runner() as runner:
        return runner.run(_interruptible(command))


async def _interruptible(command: Coroutine[Any, Any, int]) -> int:
    task = asyncio.create_task(command)
    ended_by: signal.Signals | None = None

    def on_signal(which: signal.Signals, count: int) -> None:
        nonlocal ended_by
        if count == 1:
            ended_by = which
            say("interrupted, stopping")
        task.cancel()

    with captured(on_signal):
        try:
            return await task
        except asyncio.CancelledError:
            if ended_by is None:
                raise
            return 128 + ended_by
