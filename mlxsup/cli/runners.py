"""`mlxsup ps`, `load` and `stop`: what the daemon's runners do, and what they shall do."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from mlxsup import terms
from mlxsup.cli import interrupts
from mlxsup.cli.options import Config, Json, KeepAlive, Text, Url
from mlxsup.cli.streams import json_line
from mlxsup.cli.target import Wish, daemon
from mlxsup.cli.units import human_size
from mlxsup.report import RunnerReport

_HEADINGS = ("MODEL", "STATE", "PID", "MEMORY", "ACTIVE", "QUEUE", "EXPIRES", "NOTE", "LAST ERROR")


def ps(*, json: Json = False, url: Url = "", config: Config = None) -> int:
    """List the daemon's models and the processes that serve them."""
    return interrupts.run(_ps(Wish(url=url, config=config), as_json=json))


def load(model: Text, /, *, keep_alive: KeepAlive = None, url: Url = "", config: Config = None) -> int:
    """Load a model in the daemon; returns when it is ready."""
    kept = terms.keep_alive(keep_alive, "--keep-alive")
    return interrupts.run(_load(Wish(url=url, config=config), model, kept))


def stop(
    model: Text,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Do not wait for work in flight.")] = False,
    url: Url = "",
    config: Config = None,
) -> int:
    """Unload a model in the daemon; returns when its process is gone. The next request for it loads it again."""
    return interrupts.run(_stop(Wish(url=url, config=config), model, force=force))


async def _ps(wish: Wish, *, as_json: bool) -> int:
    async with daemon(wish) as client:
        found = await client.machine()
    if as_json:
        sys.stdout.write(json_line(found))
        return 0
    rows: list[tuple[str, ...]] = [_HEADINGS]
    rows += [_row(runner, time.time()) for runner in found.runners]
    sys.stdout.write(_table(rows))
    sys.stdout.writelines(f"{device.name}: {device.note}\n" for device in found.devices if device.note)
    return 0


async def _load(wish: Wish, model: str, keep_alive: float | None) -> int:
    async with daemon(wish) as client:
        await client.load(model, keep_alive=keep_alive)
    return 0


async def _stop(wish: Wish, model: str, *, force: bool) -> int:
    async with daemon(wish) as client:
        await client.unload(model, force=force)
    return 0


def _row(runner: RunnerReport, now: float) -> tuple[str, ...]:
    state: str = runner.state
    if runner.state == "starting" and runner.progress is not None:
        state += f" {runner.progress:.0%}"
    memory = human_size(runner.memory.measured) if runner.memory.measured else "-"
    if memory == "-" and runner.pid > 0:
        memory = f"~{human_size(runner.memory.estimated)}"  # not measured yet: what was reserved
    return (
        runner.model,
        state,
        str(runner.pid) if runner.pid > 0 else "-",
        memory,
        str(runner.leases),
        str(runner.queue),
        "-" if runner.expires is None else _duration(runner.expires - now),
        runner.note or "-",
        " ".join(runner.last_error.split()) or "-",
    )


def _duration(seconds: float) -> str:
    """Write a time to come as people say it: `in 4m 10s`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"in {hours}h {minutes}m"
    return f"in {minutes}m {whole % 60}s" if minutes else f"in {whole}s"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)
