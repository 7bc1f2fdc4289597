"""What a scheduler would do with a load: the same Scheduler under virtual time, its rivals, and a bound that none can beat.

Pure: no process, no clock, nothing awaited. `mlxsup simulate` prints what `replay` returns.
"""

from __future__ import annotations

from mlxsup.simulation.replaying import Outcome, replay
from mlxsup.simulation.rivals import RIVALS
from mlxsup.simulation.traces import TRACES, Catalogue, Request, Simulated, Trace

__all__ = ["RIVALS", "TRACES", "Catalogue", "Outcome", "Request", "Simulated", "Trace", "replay"]
