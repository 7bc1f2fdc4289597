"""How runners of the NDJSON wire answer on their health path: 503 while loading, with progress, then 200."""

from __future__ import annotations

import msgspec

from mlxsup.engines.base import Finding, Verdict
from mlxsup.protocol import Health, RunnerMemory

_decoder = msgspec.json.Decoder(Health)


def read_health(status: int, body: bytes) -> Finding:
    """Read one health answer; a body that is not the wire's Health counts by its status alone."""
    if status == 200:
        return Finding(Verdict.READY)
    try:
        health = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Finding(Verdict.LOADING, detail=f"health answered {status}")
    said = f" ({health.status})" if health.status else ""
    return Finding(Verdict.LOADING, progress=health.progress, detail=f"health answered {status}{said}")


def read_memory(body: bytes) -> RunnerMemory | None:
    """Read what a health answer says of memory, None where it says nothing."""
    try:
        return _decoder.decode(body).memory
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
