"""What the registry looks at: what models need, what devices have free, what runners use of them.

Everything here but `look` may block for some milliseconds and is called in a thread.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterable, Mapping

import msgspec
import psutil

from mlxsup import host
from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES
from mlxsup.errors import ConfigError
from mlxsup.host import visible
from mlxsup.host.cards import Cards
from mlxsup.host.gpu_nvidia import Card
from mlxsup.learnt import Learnt, Lesson
from mlxsup.protocol import RunnerMemory
from mlxsup.runners import footprint, procfs
from mlxsup.runners.footprint import Observer, Sight, Watched
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.ledger import Device
from mlxsup.threads import in_thread
from mlxsup.weights import Need, Weights

log = logging.getLogger(__name__)

Use = dict[str, dict[str, int]]
"""Bytes by model and device."""

SURVEY_EVERY = 30.0
"""Seconds after which the limits of control groups are looked up again."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One look: what is free of each device, what each model has, and how its process looks.

    `used` is what counts now, shared pages divided where that is known; `needed` what a runner would take with nobody to
    share with.
    """

    free: dict[str, int]
    used: Use
    needed: Use
    sights: dict[str, Sight]


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model needs.

    Attributes:
        need: bytes.
        least: bytes that will do where there are not so many: what its files tell, where `need` is learnt.
        source: where the figure comes from, and how to have another one, in words.
        key: names model and files; under it is kept what is learnt.
        seconds: a load's time, 0 where that is not known.
        context_length: tokens the model was made for, 0 where its files were not read or do not say.
    """

    need: int
    least: int
    source: str
    key: str
    seconds: float = 0.0
    context_length: int = 0

    def event(self, model: str, attempt: int = 0) -> ev.Weighed:
        """Return it as the scheduler takes it, in answer to its question of that number."""
        return ev.Weighed(model, attempt, self.need, self.seconds, self.least, self.source)


class Reckoned(msgspec.Struct, frozen=True, kw_only=True):
    """What a model needs, what its files tell (None where they were not read), and what was learnt of it under which key."""

    need: Need
    weights: Weights | None
    key: str
    lesson: Lesson | None


def reckon(model: ModelSettings, learnt: Learnt) -> Reckoned:
    """Say what a model needs, whether or not it could run here: as declared, else as learnt, else as its files tell.

    Raises:
        UnreadableModel: its files do not tell.
    """
    weights: Weights | None = None
    key = _key(model, ())

    def earlier(files: Weights) -> int | None:
        nonlocal weights, key
        weights, key = files, _key(model, ((file.path, file.bytes) for file in files.files))
        known = learnt.get(key)
        return known.memory or None if known is not None else None

    need = ENGINES[model.engine].need(model, earlier)
    return Reckoned(need=need, weights=weights, key=key, lesson=learnt.get(key))


class Machine:
    """The devices of this machine, and how models and runners stand to them."""

    def __init__(self, learnt: Learnt) -> None:
        self._learnt = learnt
        self._observer = Observer()
        self._gauge = host.Gauge()
        self._surveyed: float | None = None
        self._last: tuple[tuple[Mapping[str, Watched], dict[str, Sight]], tuple[Use, Use]] | None = None
        self._home: host.Device | None = None
        self._cards: frozenset[str] = frozenset()
        self._driver = Cards()
        self.found: tuple[host.Device, ...] = ()

    def find_devices(self) -> None:
        """Look for devices; to be called once before anything else."""
        found = host.devices()
        for reason in found.reasons:
            log.info("%s", reason)
        self.found = found.devices
        self._driver = Cards(self.found)
        self._home = host.home()

    @property
    def home(self) -> str:
        """The device of models that name none."""
        return self._home.name if self._home is not None else "cpu"

    def devices(self, settings: Settings) -> tuple[Device, ...]:
        """Return the devices with what the configuration makes of them; from now on its cards are looked at."""
        self._cards = _cards(place for model in settings.models.values() for place in self.places(model))
        overhead = int(settings.scheduler.overhead)
        return tuple(
            Device(
                name=each.name,
                total=int(settings.devices.get(each.name, each.total)),
                minimum=each.minimum,
                overhead=overhead,
            )
            for each in self.found
        )

    def places(self, model: ModelSettings) -> tuple[str, ...]:
        """Return the devices on which a model may be."""
        if model.device not in ("", "auto"):
            return (model.device,)
        cards = tuple(each.name for each in self.found if each.kind == "cuda")
        return cards if cards and (model.device == "auto" or model.devices > 1) else (self.home,)

    def check(self, settings: Settings) -> None:
        """Refuse devices that this machine does not have.

        Raises:
            ConfigError: it names each of them.
        """
        names = [each.name for each in self.found]
        wrong = [f"devices.{name}" for name in settings.devices if name not in names]
        wrong += [
            f"models.{model.name}.device" for model in settings.models.values() if not {*self.places(model)} <= {*names}
        ]
        if wrong:
            problems = [f"{path}: no such device here; there are {', '.join(names)}" for path in wrong]
            raise ConfigError("; ".join(problems), details={"problems": problems, "source": settings.source})

    def weigh(self, model: ModelSettings) -> Weighed:
        """Say what a model needs: as declared, else as learnt, else as its files tell.

        Raises:
            EngineUnavailable, LoadFailed: it cannot run here.
            UnreadableModel: its files do not tell.
        """
        ENGINES[model.engine].check(model)
        found = reckon(model, self._learnt)
        need, known = found.need, found.lesson
        return Weighed(
            need=need.total,
            least=need.estimate if need.source == "learnt" else need.total,
            source=self._source(model.name, need.source, known),
            key=found.key,
            seconds=known.seconds if known is not None else 0.0,
            context_length=(found.weights.context_length or 0) if found.weights is not None else 0,
        )

    def _source(self, model: str, source: str, known: Lesson | None) -> str:
        """Say where a figure comes from, and what to do if it is wrong."""
        key = f"models.{model}.memory"
        if source == "declared":
            return f"{key} says so"
        if source == "estimated" or known is None:
            return f"estimated from its files: {key} overrules that"
        day = time.strftime("%Y-%m-%d", time.localtime(known.at))
        kept = self._learnt.path
        return (
            f"learnt (last load {day}), as it took so much once: {key} overrules that, or stop mlxsup and remove {kept}"
        )

    async def look(self, runners: Mapping[str, Watched], *, thorough: bool = False, all_cards: bool = False) -> Seen:
        """Look at what is free and at what runs; to be called by one task at a time.

        A common look costs some microseconds for each runner and is made here and now, as a thread would cost more. Who
        belongs to a runner, limits of control groups and proportional memory are looked up in a thread, seldom; with
        `thorough` whatever can have changed since. With `all_cards`, too, cards are asked on which no runner is yet.

        Raises:
            OSError, psutil.Error: the system does not tell just now.
            NoThreadError: there are no more threads.
        """
        now = time.monotonic()
        if overdue := self._observer.overdue(runners.values(), now, thorough=thorough):
            await self._study(overdue, (), now)
        sights = await self._look(runners)
        if self._last is not None and (runners, sights) == self._last[0] and not (thorough or self._observer.doubtful):
            used, needed = self._last[1]  # at rest, as nearly always
        else:
            sights = await self._weigh_if_due(runners, sights, now, thorough=thorough)
            used = {model: {self.home: sight.used} for model, sight in sights.items() if sight.resident}
            needed = {model: {self.home: sight.needed} for model, sight in sights.items() if sight.resident}
            for model, each in runners.items():
                if each.told is not None and model in used and len(each.shares) == 1:
                    (device,) = each.shares
                    self._hear(each.told, device, used[model], needed[model])
            self._last = (runners, sights), (used, needed)
        free = {self.home: await self._free_at_home(now)}
        cards = _cards(device for each in runners.values() for device in each.shares)
        if thorough or all_cards:  # whoever waits may go where nobody is yet
            cards |= self._cards
        if cards:
            seen = await self._driver.look(sorted(cards))
            free.update((name, card.free) for name, card in seen.items())
            held = self._held(seen, runners)
            needed = _largest(needed, held)
            used = _largest(_largest(used, held), self._presumed(seen, runners, used))
        return Seen(free=free, used=used, needed=needed, sights=sights)

    async def _weigh_if_due(
        self, runners: Mapping[str, Watched], sights: dict[str, Sight], now: float, *, thorough: bool
    ) -> dict[str, Sight]:
        """Find out what part of shared pages is whose, where that makes a difference; returns the sights after it."""
        due = [
            each.pid
            for name, each in runners.items()
            if self._observer.unweighed(
                each.pid, now, wanted=sights[name].used > each.shares.get(self.home, 0), thorough=thorough
            )
        ]
        if not due:
            return sights
        await self._study((), due, now)
        return await self._look(runners)

    def _hear(self, told: RunnerMemory, device: str, used: dict[str, int], needed: dict[str, int]) -> None:
        """Count what a runner says of itself where that is more, as with a card whose driver names no processes."""
        total = next((each.total for each in self.found if each.name == device), 0)
        now = told.active + told.cache
        for said, known in ((now, used), (max(now, told.peak), needed)):
            if said <= total:  # else it is nonsense
                known[device] = max(said, known.get(device, 0))

    def close(self) -> None:
        """Let go of what was kept open for the next look."""
        self._observer.close()

    async def _study(self, walked: Iterable[int], weighed: Iterable[int], now: float) -> None:
        self._observer.learn(await in_thread(footprint.study, walked, weighed, self._observer.leaving), now)

    async def _look(self, runners: Mapping[str, Watched]) -> dict[str, Sight]:
        pids = [each.pid for each in runners.values()]
        found = self._observer.look(pids) if procfs.AVAILABLE else await in_thread(self._observer.look, pids)
        return dict(zip(runners, found, strict=True))

    def _held(self, cards: Mapping[str, Card], runners: Mapping[str, Watched]) -> Use:
        """Return who holds how much of each card by the word of its driver."""
        held: Use = {}
        for name, card in cards.items():
            for model, each in runners.items():
                if name in each.shares:
                    members = self._observer.members(each.pid)
                    held.setdefault(model, {})[name] = sum(card.by_pid.get(member, 0) for member in members)
        return held

    def _presumed(self, cards: Mapping[str, Card], runners: Mapping[str, Watched], told: Use) -> Use:
        """Return what runners that are loaded must hold of cards whose driver does not name them.

        In a container it may name pids of the host, elsewhere none at all. What such runners hold is in use already: counted as
        still to come, it would count twice. It is what no process that we know has, and no more than was reserved for them.
        """
        presumed: Use = {}
        for name, card in cards.items():
            unnamed: dict[str, int] = {}
            rest = card.used - sum(size for pid, size in card.by_pid.items() if psutil.pid_exists(pid))
            for model, each in runners.items():
                if name not in each.shares or any(pid in card.by_pid for pid in self._observer.members(each.pid)):
                    continue
                if heard := told.get(model, {}).get(name, 0):
                    rest -= heard
                elif each.loaded:
                    unnamed[model] = each.shares[name]
            wanted = sum(unnamed.values())
            for model, share in unnamed.items():
                presumed.setdefault(model, {})[name] = share * max(0, min(rest, wanted)) // wanted if wanted else 0
        return presumed

    async def _free_at_home(self, now: float) -> int:
        if not procfs.AVAILABLE:
            return await in_thread(self._free_elsewhere)
        if self._surveyed is None or now // SURVEY_EVERY != self._surveyed // SURVEY_EVERY:
            await in_thread(self._gauge.survey)
            self._surveyed = now
        return self._gauge.free()

    def _free_elsewhere(self) -> int:
        if sys.platform == "darwin" and self._home is not None:  # sysctl would be a process each second
            return min(self._home.total, host.ram().devices[0].free)
        return host.home().free


def environment(devices: Iterable[str], *, chosen: bool) -> dict[str, str]:
    """Return what tells a runner on which devices it is; nothing where nobody chose."""
    cards = [name.removeprefix("cuda:") for name in devices if name.startswith("cuda:")]
    if not cards and not chosen:
        return {}
    return {visible.ORDER: visible.BY_BUS, visible.VARIABLE: ",".join(cards)}


def _cards(devices: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in devices if name.startswith("cuda"))


def _largest(one: Use, other: Use) -> Use:
    """Return for each model of the first what is the most of both."""
    return {
        model: {
            name: max(figures.get(name, 0), other.get(model, {}).get(name, 0))
            for name in {**figures, **other.get(model, {})}
        }
        for model, figures in one.items()
    }


def _key(model: ModelSettings, files: Iterable[tuple[str, int]]) -> str:
    """Name a model and its files, so that other files or other options are another model."""
    facts = [model.engine, model.path, msgspec.to_builtins(model.options, enc_hook=str), sorted(files)]
    return f"{model.name}:{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]}"
