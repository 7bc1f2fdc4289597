"""What the scheduler decides; the registry carries it out, in order."""

from __future__ import annotations

import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.report import State


class Spawn(msgspec.Struct, frozen=True):
    """Start a runner for the model under this generation."""

    model: str
    generation: int


class Stop(msgspec.Struct, frozen=True):
    """End the process of this generation now."""

    model: str
    generation: int


class Grant(msgspec.Struct, frozen=True):
    """Give the caller behind the ticket a lease on this generation."""

    ticket: int
    model: str
    generation: int


class Done(msgspec.Struct, frozen=True):
    """Tell the caller behind the ticket that it is so."""

    ticket: int


class Reject(msgspec.Struct, frozen=True):
    """Fail the caller behind the ticket."""

    ticket: int
    error: MlxsupError


class Changed(msgspec.Struct, frozen=True):
    """A model went from one state to another; for log, metrics and subscribers."""

    model: str
    previous: State
    state: State
    generation: int
    reason: str


class Closed(msgspec.Struct, frozen=True):
    """The shutdown is complete: nothing runs."""


Effect = Spawn | Stop | Grant | Done | Reject | Changed | Closed
