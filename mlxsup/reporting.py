"""Puts together what a supervisor says of models and devices, from the scheduler's view and the runner."""

from __future__ import annotations

import time

from mlxsup.config import ModelSettings
from mlxsup.errors import MlxsupError
from mlxsup.report import DeviceMemory, DeviceReport, MemoryReport, RunnerReport
from mlxsup.runners.runner import Runner
from mlxsup.scheduling.ledger import SLOTS, Ledger
from mlxsup.scheduling.scheduler import ModelView


def runner(model: ModelSettings, view: ModelView, found: Runner | None) -> RunnerReport:
    """Return what is known of one model; `found` is its present or last runner."""
    exit_record = found.exit if found is not None else None
    running = found is not None and found.pid > 0
    return RunnerReport(
        model=model.name,
        engine=model.engine,
        path=model.path,
        aliases=list(model.aliases),
        state=view.state,
        pid=found.pid if found is not None else -1,
        address=str(found.address) if found is not None and running else "",
        progress=found.progress if found is not None and view.state == "starting" else None,
        memory=_memory(found),
        leases=view.leases,
        queue=view.waiting,
        started=_wall(found.started) if found is not None and running else None,
        last_used=_wall(view.last_used),
        expires=_wall(view.expires),
        exits=view.exits,
        exit_code=exit_record.code if exit_record is not None else None,
        exit_signal=exit_record.signal if exit_record is not None else None,
        last_error=_last_error(view.error, found),
        reason=view.reason,
        waits_for_memory=view.claimed,
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
        )
        for name, account in ledger.accounts.items()
        if name != SLOTS
    ]


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
    return runner.last_error if runner is not None else ""
