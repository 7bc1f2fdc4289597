"""What a supervisor says of itself: plain frozen structs, the same for the library, HTTP and the CLI.

Sizes are bytes. Times are Unix seconds for people to read (None: never); every decision is made on the monotonic clock.
"""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal[
    "stopped", "starting", "ready", "draining", "stopping", "backoff", "failed", "stuck"
]  # fmt: skip
"""A model's state. `backoff` and `failed` have no process; `stuck` was sent SIGKILL and is not gone yet."""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """A runner's memory on one device: what it was thought to need before its start, uses now, used at most."""

    estimated: int = 0
    measured: int = 0
    peak: int = 0


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """The same for all devices together, and by the name of the device."""

    estimated: int = 0
    measured: int = 0
    peak: int = 0
    devices: dict[str, DeviceMemory] = {}


class RunnerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One configured model and the process that serves it, if any (pid -1 without one).

    `reason` says why it is in its state, `note` in a few words what is out of the ordinary, "" when all is well;
    `waits_for_memory` that somebody has asked for it and there is no room yet. `context_length` is in tokens: 0 where it has no
    meaning, and as long as the model's files were not read, as with a declared `memory`.
    """

    model: str
    engine: str
    path: str
    aliases: list[str]
    state: State
    pid: int = -1
    address: str = ""
    progress: float | None = None
    memory: MemoryReport = MemoryReport()
    context_length: int = 0
    leases: int = 0
    queue: int = 0
    started: float | None = None
    last_used: float | None = None
    expires: float | None = None
    exits: int = 0
    exit_code: int | None = None
    exit_signal: int | None = None
    last_error: str = ""
    reason: str = ""
    note: str = ""
    waits_for_memory: bool = False


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One device and who has it, in bytes.

    Attributes:
        name: "cpu", "metal", "cuda:0" ...
        total: what it has, or what the configuration gives of it.
        kept: what is never given out.
        reserved: what models have, the larger of what was reserved and measured for each.
        free: what the operating system calls free; None before the first look.
        available: what can be given out now.
        low: whether it is overdrawn and nothing idle could be put out: nothing more is loaded on it.
        note: the same in words, "" when all is well.
    """

    name: str
    total: int
    kept: int
    reserved: int
    free: int | None
    available: int
    low: bool = False
    note: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole supervisor at one moment; `closing` once it takes no new work."""

    version: str
    pid: int
    started: float
    closing: bool
    runners: list[RunnerReport]
    devices: list[DeviceReport] = []


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One transition of one model: the `generation` counts its processes, `reason` says why in words."""

    model: str
    state: State
    previous: State
    generation: int
    at: float
    pid: int = -1
    reason: str = ""
