"""What can happen to the scheduler. A ticket is a number that the registry gives to each question it must answer once."""

from __future__ import annotations

import msgspec

from mlxsup.errors import MlxsupError


class Acquire(msgspec.Struct, frozen=True):
    """A caller wants to use the model; answered by Grant or Reject."""

    ticket: int
    model: str


class Load(msgspec.Struct, frozen=True):
    """A caller wants the model to be ready; answered by Done or Reject."""

    ticket: int
    model: str


class Unload(msgspec.Struct, frozen=True):
    """A caller wants the model's process gone; answered by Done. `force` does not wait for work in flight."""

    ticket: int
    model: str
    force: bool = False


class Cancel(msgspec.Struct, frozen=True):
    """The caller behind this ticket has left; if it was granted meanwhile, that lease ends."""

    ticket: int
    model: str


class Release(msgspec.Struct, frozen=True):
    """The lease that this ticket got has ended."""

    ticket: int
    model: str


class Ready(msgspec.Struct, frozen=True):
    """This generation of the model's runner can be used."""

    model: str
    generation: int


class Failing(msgspec.Struct, frozen=True):
    """This generation has failed or died and is of no more use, though not all of it may be gone yet."""

    model: str
    generation: int
    error: MlxsupError


class Gone(msgspec.Struct, frozen=True):
    """This generation's process and all it left are gone; `error` says why if nobody asked for it."""

    model: str
    generation: int
    error: MlxsupError | None = None


class Stuck(msgspec.Struct, frozen=True):
    """This generation was sent SIGKILL and is still there."""

    model: str
    generation: int
    pids: list[int]


class Tick(msgspec.Struct, frozen=True):
    """Time has passed; sent when `Scheduler.wake_at` comes."""


class Shutdown(msgspec.Struct, frozen=True):
    """Take no new work and stop everything; `force` does not wait for work in flight."""

    force: bool = False


Event = Acquire | Load | Unload | Cancel | Release | Ready | Failing | Gone | Stuck | Tick | Shutdown
