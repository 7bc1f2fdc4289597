"""NVIDIA cards by NVML, the driver's own library: imported when a card is asked about, and closed again.

NVML is asked for what nobody else can tell: what is free on a card, and which process holds how much of it. Tested with a
scripted library; no machine with a card has run it.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

import msgspec

from mlxsup.host import visible
from mlxsup.host.device import MINIMUM, Device, Found

log = logging.getLogger(__name__)

_SIGNS: Final = ("dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia", "dev/dxg")
"""What a driver leaves where there may be a card; the last is Windows' in WSL."""

P = ParamSpec("P")
R = TypeVar("R")

FIND_LIMIT: Final = 20.0
"""Seconds in which a driver must tell its cards: one that nobody uses may have to wake each of them for it."""

_PREFIX: Final = "cuda:"
_MEND: Final = "pip install 'mlxsup[nvidia]'"


class Library(Protocol):
    """The functions of nvidia-ml-py (module `pynvml`) that are used; handles are the library's own."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: D102, N802
    def nvmlShutdown(self) -> None: ...  # noqa: D102, N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...  # noqa: D102, N802
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...  # noqa: D102, N802


Load = Callable[[], Library]


class NoAnswerError(Exception):
    """NVML is not there or does not answer; the message is one line."""


class Card(msgspec.Struct, frozen=True):
    """One look at a card; bytes.

    Attributes:
        total: what it has.
        free: what is not in use.
        by_pid: what each process holds, by the pids that NVML sees: in a container with pids of its own they may be the
            host's. A process whose use the driver does not tell (in WSL, with MIG) is not there.
    """

    total: int
    free: int
    by_pid: Mapping[int, int] = {}

    @property
    def used(self) -> int:
        """What is in use, by whomever."""
        return max(0, self.total - self.free)


def find(*, root: Path = Path("/"), load: Load | None = None, environ: Mapping[str, str] | None = None) -> Found:
    """Return the cards that CUDA_VISIBLE_DEVICES leaves to us; one that does not answer is left out, with the reason.

    Nothing is imported where the system shows no sign of a card.

    Args:
        root: where /dev and /proc are looked for, for tests.
        load: how to get the library, for tests.
        environ: of this process, for tests.
    """
    if not any((root / sign).exists() for sign in _SIGNS):
        return Found()
    found: list[Found] = []
    variables = os.environ if environ is None else environ

    def ask() -> None:
        try:
            found.append(_find(load, variables))
        except Exception as error:
            log.exception("unexpected failure while looking for NVIDIA cards")
            found.append(Found(reasons=(f"no NVIDIA cards: {error!r}",)))

    asking = threading.Thread(target=ask, name="mlxsup find cards", daemon=True)
    asking.start()
    asking.join(FIND_LIMIT)
    return found[0] if found else Found(reasons=("no NVIDIA cards: their driver does not answer",))


def look(device: str, *, load: Load | None = None) -> Card:
    """Look at one card; where its processes may not be listed there are none in the answer.

    Args:
        device: its name, "cuda:0".
        load: how to get the library, for tests.

    Raises:
        NoAnswerError: NVML does not answer for that card.
    """
    with _opened(load) as library:
        handle = _handle(library, device)
        memory = _asked(library, library.nvmlDeviceGetMemoryInfo, handle)
        return Card(int(memory.total), int(memory.free), _by_pid(library, handle))


def _find(load: Load | None, environ: Mapping[str, str]) -> Found:
    try:
        with _opened(load) as library:
            names = [f"{_PREFIX}{index}" for index in range(_asked(library, library.nvmlDeviceGetCount))]
            found = sum((_card(library, name) for name in names), Found())
            return _visible(library, names, found, environ)
    except NoAnswerError as error:
        return Found(reasons=(f"no NVIDIA cards: {error}",))


def _visible(library: Library, names: Sequence[str], found: Found, environ: Mapping[str, str]) -> Found:
    """Leave out the cards that CUDA would not show to this process."""
    wanted = environ.get(visible.VARIABLE)
    if wanted is None:
        return found
    chosen = visible.chosen(wanted, len(names), lambda: [_uuid(library, name) for name in names])
    kinds = {device.description for device in found.devices}
    depends = chosen.counted and len(chosen.indices) < len(names) and len(kinds) > 1
    if depends and environ.get(visible.ORDER) != visible.BY_BUS:
        log.warning(
            "%s=%s counts cards of several kinds, which CUDA puts in an order of its own unless %s is %s: here they are counted"
            " in the order of the bus; name them by their UUIDs to be sure",
            *(visible.VARIABLE, wanted, visible.ORDER, visible.BY_BUS),
        )
    shown = {names[index] for index in chosen.indices}
    hidden = tuple(f"{name} left out: {visible.VARIABLE} does not name it" for name in names if name not in shown)
    return Found(tuple(device for device in found.devices if device.name in shown), found.reasons + hidden)


def _uuid(library: Library, name: str) -> str:
    with suppress(NoAnswerError):
        return _text(_asked(library, library.nvmlDeviceGetUUID, _handle(library, name)))
    return ""


def _by_pid(library: Library, handle: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for ask in (library.nvmlDeviceGetComputeRunningProcesses, library.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(NoAnswerError):
            for process in _asked(library, ask, handle):
                used = process.usedGpuMemory
                if isinstance(used, int):  # a process that computes and draws is in both lists, with the same figure
                    found[process.pid] = max(used, found.get(process.pid, 0))
    return found


def _card(library: Library, name: str) -> Found:
    try:
        handle = _handle(library, name)
        memory = _asked(library, library.nvmlDeviceGetMemoryInfo, handle)
        description = _text(_asked(library, library.nvmlDeviceGetName, handle))
    except NoAnswerError as error:
        return Found(reasons=(f"{name} left out: {error}",))
    device = Device(
        name=name,
        kind="cuda",
        total=int(memory.total),
        minimum=MINIMUM["cuda"],
        free=int(memory.free),
        description=description,
    )
    return Found((device,))


def _text(answer: str | bytes) -> str:
    """Return a name, which earlier versions of the library give as bytes."""
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer


def _handle(library: Library, device: str) -> Any:
    number = device.removeprefix(_PREFIX)
    if not device.startswith(_PREFIX) or not number.isdecimal():
        raise NoAnswerError(f"{device!r} is no NVIDIA card")
    return _asked(library, library.nvmlDeviceGetHandleByIndex, int(number))


@contextmanager
def _opened(load: Load | None) -> Iterator[Library]:
    library = (load or _import)()
    _asked(library, library.nvmlInit)
    try:
        yield library
    finally:
        with suppress(library.NVMLError):
            library.nvmlShutdown()


def _import() -> Library:
    try:
        return cast("Library", importlib.import_module("pynvml"))
    except ImportError as error:
        raise NoAnswerError(f"nvidia-ml-py is not installed; mend: {_MEND}") from error


def _asked(library: Library, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    try:
        return function(*arguments, **named)
    except (library.NVMLError, OSError, AttributeError) as error:
        raise NoAnswerError(str(error) or type(error).__name__) from error
