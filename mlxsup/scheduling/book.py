"""What the scheduler knows: of each model what is asked of it (Policy), how it is (Book), and what others may see (ModelView)."""

from __future__ import annotations

from typing import Literal

import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.report import State
from mlxsup.scheduling.backoff import Backoff, Breaker
from mlxsup.scheduling.eviction import Worth

Priority = Literal["high", "normal", "low"]

HEAD_START: dict[Priority, float] = {"high": 60.0, "normal": 0.0, "low": -60.0}
"""By so many seconds a request is taken for older than it is; so it comes before others, and nobody starves."""

WEIGHT: dict[Priority, float] = {"high": 4.0, "normal": 1.0, "low": 0.25}
"""The factor of the priority in what a model is worth."""

ON_ITS_OWN = Backoff(first=1.0, most=300.0, healthy=300.0)
"""How often that is tried which nobody has asked for: each try that ends badly soon makes the next wait twice as long."""

_LIVE = frozenset({"starting", "ready", "draining", "stopping", "stuck"})
_LOAD_RATE = 1 << 30
"""Bytes a second: how fast a load is thought to be that was never seen, after a second for the program itself."""
_NEWER = 0.3
"""The part of the latest load in the learnt time of loads."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of one model.

    Attributes:
        keep_alive: seconds it stays after its last use, negative for ever.
        concurrency: requests at once.
        queue: requests that may wait.
        drain_timeout: seconds that work in flight has when it is unloaded.
        priority: whom to serve first, and to keep.
        pinned: it is never put out for others or for being idle, and comes up again after a crash.
        preload: it is loaded at the start, if it fits then.
        comes_back: once put out for another, it is loaded again when there is room.
        memory: bytes it needs; None: to be asked for before each load.
        devices: where it may be; none at all: its memory is not counted.
        spread: on how many of them it may be at once, a part on each.
    """

    keep_alive: float
    concurrency: int
    queue: int
    drain_timeout: float
    priority: Priority = "normal"
    pinned: bool = False
    preload: bool = False
    comes_back: bool = False
    memory: int | None = 0
    devices: tuple[str, ...] = ()
    spread: int = 1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all models; seconds but for `max_loaded`.

    Attributes:
        max_loaded: models at once; 0: as many as memory holds.
        min_residency: a model that became ready is not put out for others before this has passed.
        patience: who has waited for memory so long has busy models refuse new work, until enough of them are idle; who finds
            that other programs hold it waits so long that they give it back.
        settle: the memory of a process that is gone is waited for at most so long.
        look: between two looks at memory that should come back.
        backoff: how failures are met.
    """

    max_loaded: int = 0
    min_residency: float = 0.0
    patience: float = 15.0
    settle: float = 5.0
    look: float = 0.1
    backoff: Backoff = Backoff()


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model's scheduling state at one moment; times are monotonic, None for never.

    `reserved` is bytes by device, `claimed` tells that it waits for memory, `weighing` that it is not known yet for how much,
    `wanted` that nobody waits for it and it shall be loaded all the same, `parting` why its last process went or goes.
    """

    state: State
    generation: int
    leases: int
    waiting: int
    last_used: float | None
    expires: float | None
    exits: int
    error: MlxsupError | None
    reserved: dict[str, int] = {}
    claimed: bool = False
    weighing: bool = False
    wanted: bool = False
    reason: str = ""
    parting: str = ""
    retry_at: float | None = None


class Claim:
    """A model's wish to be loaded, from the first who asks for it to its start."""

    def __init__(self, rank: float, reason: str, *, gentle: bool, weighed: bool) -> None:
        self.rank = rank
        self.reason = reason
        self.gentle = gentle
        """Nobody waits for it, so nobody goes for it."""
        self.wished = False
        """Whether it was gentle before somebody asked for the model, and will be again when they leave."""
        self.weighed = weighed
        """Whether its need is known."""
        self.turn = 1
        """When it is looked at: 0, before others, as some were put out for it; 2, after them, as nobody waits for it."""
        self.impatient = False
        self.victims: tuple[str, ...] = ()
        """Who was put out for it, the last time that anybody was."""
        self.short_until: float | None = None
        """When it is refused, unless other programs give memory back before; None where it is not for them that it waits."""
        self.seen = False
        """Whether it was looked at, and so not found to be impossible."""

    def place(self, name: str) -> tuple[int, float, str]:
        """Return where in the line the claim of the model of that name stands."""
        return self.turn, self.rank, name


class Book:
    """All that is known of one model."""

    def __init__(self, name: str, policy: Policy, rules: Backoff) -> None:
        self.name = name
        self.policy = policy
        self.state: State = "stopped"
        self.generation = 0
        self.attempt = 0
        """Counts the questions for its need: an answer to an earlier one is ignored."""
        self.waiting: dict[int, float] = {}
        """Tickets that wait for a lease, with the time they came; oldest first."""
        self.wished: dict[int, float] = {}
        """Tickets of those with a wish for keep-alive."""
        self.loading: dict[int, float] = {}
        self.unloading: list[int] = []
        self.leases: set[int] = set()
        self.claim: Claim | None = None
        self.breaker = Breaker(rules)
        self.again = Breaker(ON_ITS_OWN)
        """When it may be loaded unasked, after it was put out for want of memory or could not be loaded."""
        self.need = policy.memory or 0
        self.least = 0
        """Bytes that will do where there are not as many as it needs; 0: fewer will not do."""
        self.source = ""
        """Where that figure comes from, in words."""
        self.seconds = 0.0
        """What a load takes, 0 where none was seen."""
        self.spawned_at = 0.0
        self.ready_at = 0.0
        self.asked_keep_alive: float | None = None
        self.last_used: float | None = None
        self.idle_since = 0.0
        self.unused = False
        """Whether it was loaded for its own sake and waits for its first use."""
        self.expires: float | None = None
        self.drain_until: float | None = None
        self.for_others = False
        """Whether it goes because its memory is needed."""
        self.then: Literal["", "return", "renew"] = ""
        """What shall become of it when it is gone: it comes back when there is room, or at once, in its new form."""
        self.unloaded = False
        """Whether somebody had it unloaded, and nobody asked for it since."""
        self.refused_at: float | None = None
        """When it was found to be beyond help: it is not tried again before that can have changed."""
        self.exits = 0
        self.error: MlxsupError | None = None
        self.reason = ""
        self.parting = ""
        """Why its process was asked to go, or went; "" while it is to stay."""
        self.removed = False

    @property
    def live(self) -> bool:
        """Whether a process exists or is being made."""
        return self.state in _LIVE

    @property
    def keep_alive(self) -> float:
        """What holds now: what a granted request asked for, else the policy's; for ever where it is pinned."""
        if self.policy.pinned:
            return -1.0
        return self.policy.keep_alive if self.asked_keep_alive is None else self.asked_keep_alive

    def first_rank(self, now: float) -> float:
        """Return the time that who waits longest came, or now, less the head start of its priority; the lowest is first."""
        came = min(next(iter(self.waiting.values()), now), next(iter(self.loading.values()), now))
        return came - HEAD_START[self.policy.priority]

    def worth(self, size: int, now: float) -> Worth:
        """Return what it is worth keeping by, as it holds `size` bytes."""
        seconds = self.seconds or 1.0 + size / _LOAD_RATE
        left = self.keep_alive if self.expires is None else max(0.0, self.expires - now)
        return Worth(seconds=seconds, size=size, weight=WEIGHT[self.policy.priority], keep_alive=left)

    def learn(self, seconds: float) -> None:
        """Take note of how long a load took."""
        self.seconds = seconds if not self.seconds else self.seconds + _NEWER * (seconds - self.seconds)

    def view(self, reserved: dict[str, int], *, returning: bool = False) -> ModelView:
        """Return what others may see."""
        retries = self.state == "backoff" and self.claim is None and not returning
        return ModelView(
            state=self.state,
            generation=self.generation,
            leases=len(self.leases),
            waiting=len(self.waiting) + len(self.loading),
            last_used=self.last_used,
            expires=self.expires,
            exits=self.exits,
            error=self.error,
            reserved=reserved,
            claimed=self.claim is not None,
            weighing=self.claim is not None and not self.claim.weighed,
            wanted=returning or (self.claim is not None and self.claim.gentle),
            reason=self.reason,
            parting=self.parting,
            retry_at=self.breaker.retry_at if retries else None,
        )
