"""The same load for each way to choose who goes: what `mlxsup simulate` and `make bench` print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from mlxsup.scheduling.ledger import Device
from mlxsup.scheduling.scheduler import Limits, Policy, Scheduler
from mlxsup.simulation.bounds import least
from mlxsup.simulation.replaying import Outcome, replay
from mlxsup.simulation.rivals import RIVALS, Rival
from mlxsup.simulation.traces import Request, Simulated

DEVICE = "memory"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for a simulation: bytes for models, and the keys of a configuration.

    `own` has what holds for single models instead, without what they need and where they are.
    """

    memory: int
    keep_alive: float = 3600.0
    concurrency: int = 4
    queue: int = 512
    min_residency: float = 5.0
    max_loaded: int = 0
    own: Mapping[str, Policy] = {}


def scheduler_for(models: Sequence[Simulated], setting: Setting, rival: Rival) -> Scheduler:
    """Make a scheduler of these models with a rival's order."""
    common = Policy(
        keep_alive=setting.keep_alive,
        concurrency=setting.concurrency,
        queue=setting.queue,
        drain_timeout=30.0,
    )
    policies = {
        model.name: msgspec.structs.replace(
            setting.own.get(model.name, common), memory=model.size, devices=(DEVICE,), spread=1
        )
        for model in models
    }
    most = max(1, setting.memory // max(model.size for model in models)) if rival.by_count else setting.max_loaded
    limits = Limits(min_residency=setting.min_residency, max_loaded=most)
    return Scheduler(policies, setting.queue, limits, (Device(name=DEVICE, total=setting.memory),), rival.order())


def compare(
    models: Sequence[Simulated], trace: Sequence[Request], setting: Setting, names: Iterable[str] = RIVALS
) -> dict[str, Outcome]:
    """Replay a load for each of these orders."""
    return {name: replay(scheduler_for(models, setting, RIVALS[name]), models, trace) for name in names}


def bound(models: Sequence[Simulated], outcome: Outcome, setting: Setting) -> float:
    """Return seconds of loads that nobody does with less of who serves requests in the order of this outcome."""
    return least(models, outcome.served, setting.memory)
