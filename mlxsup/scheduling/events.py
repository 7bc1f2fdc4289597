"""What can happen to the scheduler. A ticket is a number that the registry gives to each question it must answer once."""

from __future__ import annotations

import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.scheduling.book import Limits, Policy
from mlxsup.scheduling.ledger import Device


class Acquire(msgspec.Struct, frozen=True):
    """A caller wants to use the model; answered by Grant or Reject.

    `keep_alive` is a wish for the time after it (seconds, negative for ever), which holds until the model is unloaded.
    """

    ticket: int
    model: str
    keep_alive: float | None = None


class Load(msgspec.Struct, frozen=True):
    """A caller wants the model to be ready; answered by Done or Reject. `keep_alive` is as for Acquire."""

    ticket: int
    model: str
    keep_alive: float | None = None


class Unload(msgspec.Struct, frozen=True):
    """A caller wants the model's process gone; answered by Done. `force` does not wait for work in flight.

    A pinned model goes by force only: else it is answered by Reject.
    """

    ticket: int
    model: str
    force: bool = False


class Cancel(msgspec.Struct, frozen=True):
    """The caller behind this ticket has left; if it was granted meanwhile, that lease ends, and a load that has begun goes on."""

    ticket: int
    model: str


class Release(msgspec.Struct, frozen=True):
    """The lease that this ticket got has ended."""

    ticket: int
    model: str


class Weighed(msgspec.Struct, frozen=True):
    """The model needs so many bytes.

    Attributes:
        seconds: what its loads took in an earlier life, 0 where that is not known.
        least: bytes that will do where no device can give as many as it needs; 0: fewer will not do.
        source: where the figure comes from, in words that follow "its need is".
    """

    model: str
    attempt: int
    need: int
    seconds: float = 0.0
    least: int = 0
    source: str = ""


class Unfit(msgspec.Struct, frozen=True):
    """The model cannot be loaded, as a look at its files or at the machine showed."""

    model: str
    attempt: int
    error: MlxsupError


class Sampled(msgspec.Struct, frozen=True):
    """What is free of each device, and what each model's runner uses of them, looked at together.

    `used` is by model, with the generation that was looked at.
    """

    free: dict[str, int]
    used: dict[str, tuple[int, dict[str, int]]]


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
    """This generation's process and all it left are gone; `error` says why if nobody asked for it.

    `jitter`, 0 to 1, is luck for the time until the next try.
    """

    model: str
    generation: int
    error: MlxsupError | None = None
    jitter: float = 0.0


class Stuck(msgspec.Struct, frozen=True):
    """This generation was sent SIGKILL and is still there."""

    model: str
    generation: int
    pids: list[int]


class Start(msgspec.Struct, frozen=True):
    """The beginning: load what shall be loaded before it is asked for."""


class Reconfigure(msgspec.Struct, frozen=True, kw_only=True):
    """Other models, or the same ones otherwise; what is loaded goes on unless it is gone from them or in `restart`.

    Those in `restart` end their work and are loaded anew: at once where they are pinned or preloaded, unless somebody had
    them unloaded, else when they are asked for. A new one with `preload` is loaded if it fits.
    """

    policies: dict[str, Policy]
    queue: int
    limits: Limits
    devices: tuple[Device, ...] = ()
    restart: frozenset[str] = frozenset()


class Tick(msgspec.Struct, frozen=True):
    """Time has passed; sent when `Scheduler.wake_at` comes."""


class Shutdown(msgspec.Struct, frozen=True):
    """Take no new work and stop everything; `force` does not wait for work in flight."""

    force: bool = False


Event = (
    Acquire
    | Load
    | Unload
    | Cancel
    | Release
    | Weighed
    | Unfit
    | Sampled
    | Ready
    | Failing
    | Gone
    | Stuck
    | Start
    | Reconfigure
    | Tick
    | Shutdown
)
