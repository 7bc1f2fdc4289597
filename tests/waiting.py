"""Waiting for what nobody tells, such as a figure in a report."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

LIMIT = 10.0
"""Seconds after which it is a failure that something is not so yet."""


async def until(true: Callable[[], object], limit: float = LIMIT) -> float:
    """Wait until something is true, and return how many seconds that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit, f"not within {limit:g} s"
        await anyio.sleep(0.002)
    return time.monotonic() - began
