"""What the scheduler decides; the registry carries it out, in order."""

from __future__ import annotations

import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.report import State


class Weigh(msgspec.Struct, frozen=True):
    """Find out what the model needs, and look at what is free; answered by Weighed or Unfit."""

    model: str
    attempt: int


class Look(msgspec.Struct, frozen=True):
    """Look at what is free and in use now; answered by Sampled."""


class Spawn(msgspec.Struct, frozen=True):
    """Start a runner for the model under this generation; it may use so many bytes of these devices."""

    model: str
    generation: int
    shares: dict[str, int] = {}


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


class Noticed(msgspec.Struct, frozen=True):
    """Something about a model that is worth a word, and no transition."""

    model: str
    state: State
    generation: int
    reason: str


class Forget(msgspec.Struct, frozen=True):
    """The model is not configured any more, and nothing of it runs."""

    model: str


class Closed(msgspec.Struct, frozen=True):
    """The shutdown is complete: nothing runs."""


Effect = Weigh | Look | Spawn | Stop | Grant | Done | Reject | Changed | Noticed | Forget | Closed
