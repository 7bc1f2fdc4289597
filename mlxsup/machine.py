"""What the registry looks at off the loop: what models need, what devices have free, what runners use of them.

Everything here blocks for some milliseconds and is called in a thread.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping

import msgspec

from mlxsup import host
from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES
from mlxsup.errors import ConfigError
from mlxsup.host import gpu_nvidia
from mlxsup.records import Learnt, Lesson
from mlxsup.runners.footprint import Observer, Sight
from mlxsup.scheduling.ledger import Device
from mlxsup.weights import Weights

Look = Mapping[str, tuple[int, tuple[str, ...]]]
"""Runners to look at: the pid of each model's process, and the devices it was placed on."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One look: bytes free by device, bytes used by model and device, and how each process looks."""

    free: dict[str, int]
    used: dict[str, dict[str, int]]
    sights: dict[str, Sight]


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model needs; `key` names model and files, under which is kept what is learnt, `seconds` is a load's time."""

    need: int
    key: str
    seconds: float = 0.0


class Machine:
    """The devices of this machine, and how models and runners stand to them."""

    def __init__(self, learnt: Learnt) -> None:
        self._learnt = learnt
        self._observer = Observer()
        self._home: host.Device | None = None
        self.found: tuple[host.Device, ...] = ()

    def find_devices(self) -> None:
        """Look for devices; to be called once before anything else."""
        self.found = host.devices().devices
        self._home = host.home()

    @property
    def home(self) -> str:
        """The device of models that name none."""
        return self._home.name if self._home is not None else "cpu"

    def devices(self, settings: Settings) -> tuple[Device, ...]:
        """Return the devices with what the configuration makes of them."""
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
        engine = ENGINES[model.engine]
        engine.check(model)
        lesson: list[tuple[str, Lesson | None]] = []

        def learnt(files: Weights) -> int | None:
            key = _key(model, ((file.path, file.bytes) for file in files.files))
            lesson.append((key, self._learnt.get(key)))
            known = lesson[-1][1]
            return known.memory or None if known is not None else None

        need = engine.need(model, learnt)
        if not lesson:
            key = _key(model, ())
            lesson.append((key, self._learnt.get(key)))
        key, known = lesson[-1]
        return Weighed(need=need.total, key=key, seconds=known.seconds if known is not None else 0.0)

    def look(self, runners: Look) -> Seen:
        """Look at what is free and at what runs."""
        pids = [pid for pid, _ in runners.values()]
        sights = dict(zip(runners, self._observer.look(pids), strict=True))
        used = {model: {self.home: sight.resident} for model, sight in sights.items() if sight.resident}
        free = {self.home: self._free_at_home()}
        cards = {device for _, devices in runners.values() for device in devices if device.startswith("cuda")}
        for card in sorted(cards):
            try:
                free[card], by_pid = gpu_nvidia.free(card), gpu_nvidia.used_by_process(card)
            except gpu_nvidia.NoAnswerError:
                continue
            for model, (pid, devices) in runners.items():
                if card in devices and model in used:
                    used[model][card] = sum(by_pid.get(member, 0) for member in self._observer.members(pid))
        return Seen(free=free, used=used, sights=sights)

    def _free_at_home(self) -> int:
        if (
            sys.platform == "darwin" and self._home is not None
        ):  # asking sysctl each second would start a process each time
            return min(self._home.total, host.ram().devices[0].free)
        return host.home().free


def environment(devices: Iterable[str], *, chosen: bool) -> dict[str, str]:
    """Return what tells a runner on which devices it is; nothing where nobody chose."""
    cards = [name.removeprefix("cuda:") for name in devices if name.startswith("cuda:")]
    if not cards and not chosen:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(cards)}


def _key(model: ModelSettings, files: Iterable[tuple[str, int]]) -> str:
    """Name a model and its files, so that other files or other options are another model."""
    facts = [model.engine, model.path, msgspec.to_builtins(model.options, enc_hook=str), sorted(files)]
    return f"{model.name}:{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]}"
