"""What a scheduler would do with a load: the same Scheduler under virtual time, its rivals, and a bound that none can beat.

Pure: no process, no clock, nothing awaited. `mlxsup simulate` prints what `replay` returns.
"""

from __future__ import annotations

from mlxsup.simulation.bounds import exact, farthest, least
from mlxsup.simulation.comparing import Setting, bound, compare, scheduler_for
from mlxsup.simulation.replaying import Outcome, replay
from mlxsup.simulation.rivals import OURS, RIVALS
from mlxsup.simulation.traces import TRACES, Catalogue, Request, Simulated, Trace

__all__ = [
    "OURS",
    "RIVALS",
    "TRACES",
    "Catalogue",
    "Outcome",
    "Request",
    "Setting",
    "Simulated",
    "Trace",
    "bound",
    "compare",
    "exact",
    "farthest",
    "least",
    "replay",
    "scheduler_for",
]
