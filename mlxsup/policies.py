"""From the configuration to what the scheduler must know of models."""

from __future__ import annotations

from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES
from mlxsup.machine import Machine
from mlxsup.scheduling.scheduler import Limits, Policy


def limits(settings: Settings) -> Limits:
    """Return what holds for all models."""
    return Limits(max_loaded=settings.scheduler.max_loaded, min_residency=settings.scheduler.min_residency)


def policies(settings: Settings, machine: Machine) -> dict[str, Policy]:
    """Return what holds for each model; what it needs is asked for before each load."""
    return {name: policy(model, settings, machine.places(model)) for name, model in settings.models.items()}


def policy(model: ModelSettings, settings: Settings, devices: tuple[str, ...]) -> Policy:
    """Return what holds for one model that may be on these devices."""
    common = settings.scheduler
    own = ENGINES[model.engine].default_concurrency
    return Policy(
        keep_alive=common.keep_alive if model.keep_alive is None else model.keep_alive,
        concurrency=own if model.concurrency is None else model.concurrency,
        queue=common.queue if model.queue is None else model.queue,
        drain_timeout=model.drain_timeout,
        priority=model.priority,
        pinned=model.pinned,
        preload=model.preload,
        comes_back=model.comes_back,
        memory=None,
        devices=devices,
        spread=model.devices,
    )
