"""Counts what a process holds, by kind, so that two looks can be compared and what has grown be named."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from mlxsup import Supervisor

MIB = 1 << 20
MAX_GROWTH = MIB
"""Bytes of resident memory by which a supervisor may grow once it is warm."""

AT_REST = (
    *("Registry._answers", "Registry._events", "Guard._groups", "Guard._unsent"),
    *("_Model.waiting", "_Model.loading", "_Model.unloading", "_Model.leases"),
    *("users of runners", "requests that wait for runners"),
)
"""Tables with nothing in them when no model is loaded and nobody waits."""

_NUMBER = re.compile(r"\d+|(?<=mlxsup-)\w+")


class Look(msgspec.Struct):
    """What there is: counts by kind (`descriptors`, `tasks`...) and then by what it is; memory in bytes; after how many cycles."""

    cycles: int
    memory: int
    counts: dict[str, dict[str, int]]

    def total(self, kind: str) -> int:
        """How many of one kind."""
        return sum(self.counts[kind].values())

    @property
    def left(self) -> list[str]:
        """Name what should not be there when nothing runs."""
        return [f"{what}: {count}" for what in AT_REST if (count := self.counts["tables"].get(what, 0))]

    def beyond(self, earlier: Look) -> list[str]:
        """Name what is here more often than it was."""
        return [
            f"{kind}: {what}: {earlier.counts[kind].get(what, 0)} -> {count}"
            for kind, found in self.counts.items()
            for what, count in found.items()
            if count > earlier.counts[kind].get(what, 0)
        ]


def look(sup: Supervisor, cycles: int) -> Look:
    """Count everything; garbage is collected first."""
    while gc.collect():
        pass
    _give_back()
    return Look(
        cycles=cycles,
        memory=int(psutil.Process().memory_info().rss),
        counts={
            "descriptors": _counted(_descriptors()),
            "threads": _counted(thread.name for thread in threading.enumerate()),
            "tasks": _counted(task.get_name() for task in asyncio.all_tasks()),
            "children": _counted(_children()),
            "files": _counted(_files()),
            "tables": _tables(sup),
            "objects": _objects(),
        },
    )


def _counted(names: Iterator[str]) -> dict[str, int]:
    """Numbers in names are left out: it is the kind that matters."""
    return dict(Counter(_NUMBER.sub("*", name) for name in names))


def _descriptors() -> Iterator[str]:
    linux = sys.platform == "linux"
    for path in Path("/proc/self/fd" if linux else "/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder is closed again
            yield str(path.readlink()) if linux else "descriptor"


def _children() -> Iterator[str]:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            yield f"{' '.join(child.cmdline()[:6])} ({child.status()})"


def _files() -> Iterator[str]:
    for root in {os.environ["TMPDIR"], os.environ["XDG_STATE_HOME"]}:
        yield from (str(path.relative_to(root)) for path in Path(root).rglob("*"))


def _tables(sup: Supervisor) -> dict[str, int]:
    """The length of every container in the supervisor's inner parts."""
    running = sup._running
    assert running is not None
    registry = running.registry
    found: Counter[str] = Counter()
    parts: list[object] = [registry, registry._scheduler, registry._guard, registry._addresses]
    parts += registry._scheduler._books.values()
    for part in parts:
        for name, value in vars(part).items():
            if hasattr(value, "__len__") and not isinstance(value, str | msgspec.Struct):
                found[f"{type(part).__name__}.{name}"] += len(value)
    found["users of runners"] = sum(runner.pulse.users for runner in registry._runners.values())
    found["requests that wait for runners"] = sum(runner.pulse.waiting for runner in registry._runners.values())
    return dict(found)


def _objects() -> dict[str, int]:
    """Living objects of our classes, and of those that hold on to something; not timers, of which there is one more or less."""
    kinds = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    ours = ("mlxsup.", "aiohttp.", "_asyncio.", "uvloop.")
    return {kind: count for kind, count in kinds.items() if kind.startswith(ours) and not kind.endswith("TimerHandle")}


def _give_back() -> None:
    """Have the C library return what is free to the system, or its pools would be taken for growth."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
