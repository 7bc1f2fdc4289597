"""Puts together what a supervisor says of models and devices, from the scheduler's view and the runner."""

from __future__ import annotations

import re
import time

from mlxsup.config import ModelSettings
from mlxsup.errors import MlxsupError
from mlxsup.report import DeviceMemory, DeviceReport, MemoryReport, RunnerReport
from mlxsup.runners.output import shown
from mlxsup.runners.runner import Runner
from mlxsup.scheduling.ledger import SLOTS, UNNOTICED, Account, Ledger
from mlxsup.scheduling.scheduler import ModelView
from mlxsup.sizes import rounded_size

_WHYS_AND_HOWS = re.compile(r"[:;] | \(")
"""Where a reason goes into the figures behind it."""


def runner(model: ModelSettings, view: ModelView, found: Runner | None, context_length: int) -> RunnerReport:
    """Return what is known of one model; `found` is its present or last runner, `context_length` from its last weighing."""
    exit_record = found.exit if found is not None else None
    running = found is not None and found.pid > 0
    memory = _memory(found)
    return RunnerReport(
        model=model.name,
        engine=model.engine,
        path=model.path,
        aliases=list(model.aliases),
        state=view.state,
        pid=found.pid if found is not None else -1,
        address=str(found.address) if found is not None and running else "",
        progress=found.progress if found is not None and view.state == "starting" else None,
        memory=memory,
        context_length=context_length,
        leases=view.leases,
        queue=view.waiting,
        started=_wall(found.started) if found is not None and running else None,
        last_used=_wall(view.last_used),
        expires=_wall(view.expires),
        exits=view.exits,
        exit_code=exit_record.code if exit_record is not None else None,
        exit_signal=exit_record.signal if exit_record is not None else None,
        last_error=_last_error(view.error, found),
        reason=_reason(view),
        note=_note(view, memory, "reserved" if model.memory is None else "declared"),
        waits_for_memory=view.claimed and not view.weighing,
    )


def devices(ledger: Ledger) -> list[DeviceReport]:
    """Return what each device has and what is given out of it."""
    return [
        DeviceReport(
            name=name,
            total=account.device.total,
            kept=account.kept,
            reserved=account.counted,
            free=account.free,
            available=max(0, account.available),
            low=account.low,
            note=_low(account),
        )
        for name, account in ledger.accounts.items()
        if name != SLOTS
    ]


def _reason(view: ModelView) -> str:
    if view.weighing:
        return "its files are being read, for how much memory it needs"
    return view.parting if view.state == "stopped" and view.parting else view.reason


def _low(account: Account) -> str:
    if not account.low or not account.shortage:
        return ""
    return f"low on memory: no new loads until {rounded_size(account.shortage)} more are free"


def _note(view: ModelView, memory: MemoryReport, how: str) -> str:
    """Say in a few words why a model is as it is, where that is no matter of course; `how` its memory came to be known."""
    if view.state == "stuck":
        return "does not die of SIGKILL"
    if view.weighing:
        return "reading its files"
    if view.claimed and view.state not in ("draining", "stopping"):
        return "waiting for memory"
    cause = _cause(view.error)
    if view.state == "backoff" and view.retry_at is None and view.wanted:
        return f"{cause}; loaded when that has changed"
    if view.state == "backoff":
        wait = max(0.0, (view.retry_at or 0.0) - time.monotonic())
        return f"backing off {wait:.0f} s after {cause}"
    if view.state == "failed":
        return cause
    if view.state in ("starting", "ready"):
        given = [each for each in memory.devices.values() if each.estimated]
        grown = sum(max(0, each.measured - each.estimated) for each in given)
        used = sum(each.measured for each in given)
        return f"uses {rounded_size(used)}, {rounded_size(grown)} more than {how}" if grown > UNNOTICED else ""
    return _WHYS_AND_HOWS.split(view.parting, 1)[0]


def _cause(error: MlxsupError | None) -> str:
    """Name the cause of a failure: `exit code 1`, `SIGKILL`, `insufficient memory`."""
    if error is None:
        return "a failure"
    if error.details.get("exit_code") is not None:
        return f"exit code {error.details['exit_code']}"
    return str(error.details.get("signal") or error.code.replace("_", " "))


def _memory(runner: Runner | None) -> MemoryReport:
    if runner is None:
        return MemoryReport()
    names = [*runner.shares, *(name for name in runner.used if name not in runner.shares)]
    running = runner.pid > 0
    devices = {
        name: DeviceMemory(
            estimated=runner.shares.get(name, 0),
            measured=runner.used.get(name, 0) if running else 0,
            peak=runner.peak.get(name, 0),
        )
        for name in names
    }
    return MemoryReport(
        estimated=sum(each.estimated for each in devices.values()),
        measured=sum(each.measured for each in devices.values()),
        peak=sum(each.peak for each in devices.values()),
        devices=devices,
    )


def _wall(monotonic: float | None) -> float | None:
    return None if monotonic is None else round(time.time() - time.monotonic() + monotonic, 3)


def _last_error(error: MlxsupError | None, runner: Runner | None) -> str:
    if error is not None:
        return error.message
    return shown(runner.last_error) if runner is not None else ""
