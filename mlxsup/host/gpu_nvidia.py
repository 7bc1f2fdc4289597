"""NVIDIA cards by NVML, the driver's own library: imported when a card is asked about, and closed again.

NVML is asked for what nobody else can tell: what is free on a card, and which process holds how much of it. Tested with a
scripted library; no machine with a card has run it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

from mlxsup.host.device import MINIMUM, Device, Found

_SIGNS: Final = ("dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia", "dev/dxg")
"""What a driver leaves where there may be a card; the last is Windows' in WSL."""

P = ParamSpec("P")
R = TypeVar("R")

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
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...  # noqa: D102, N802
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any, /) -> Sequence[Any]: ...  # noqa: D102, N802


Load = Callable[[], Library]


class NoAnswerError(Exception):
    """NVML is not there or does not answer; the message is one line."""


def find(*, root: Path = Path("/"), load: Load | None = None) -> Found:
    """Return the cards; a card that does not answer is left out, with the reason.

    Nothing is imported where the system shows no sign of a card.

    Args:
        root: where /dev and /proc are looked for, for tests.
        load: how to get the library, for tests.
    """
    if not any((root / sign).exists() for sign in _SIGNS):
        return Found()
    try:
        with _opened(load) as library:
            count = _asked(library, library.nvmlDeviceGetCount)
            return sum((_card(library, index) for index in range(count)), Found())
    except NoAnswerError as error:
        return Found(reasons=(f"no NVIDIA cards: {error}",))


def used_by_process(device: str, *, load: Load | None = None) -> dict[int, int]:
    """Return the bytes each process holds on a card, by pid.

    Pids are those NVML sees: in a container with pids of its own they may be the host's. A process whose use the driver does
    not tell (in WSL, with MIG) is left out.

    Args:
        device: its name, "cuda:0".
        load: how to get the library, for tests.

    Raises:
        NoAnswerError: NVML does not answer for that card.
    """
    with _opened(load) as library:
        handle = _handle(library, device)
        found: dict[int, int] = {}
        for ask in (library.nvmlDeviceGetComputeRunningProcesses, library.nvmlDeviceGetGraphicsRunningProcesses):
            for process in _asked(library, ask, handle):
                used = process.usedGpuMemory
                if isinstance(used, int):  # a process that computes and draws is in both lists, with the same figure
                    found[process.pid] = max(used, found.get(process.pid, 0))
        return found


def free(device: str, *, load: Load | None = None) -> int:
    """Return the bytes that are free on a card now.

    Raises:
        NoAnswerError: NVML does not answer for that card.
    """
    with _opened(load) as library:
        return int(_asked(library, library.nvmlDeviceGetMemoryInfo, _handle(library, device)).free)


def _card(library: Library, index: int) -> Found:
    try:
        handle = _handle(library, f"{_PREFIX}{index}")
        memory = _asked(library, library.nvmlDeviceGetMemoryInfo, handle)
        name = _asked(library, library.nvmlDeviceGetName, handle)
    except NoAnswerError as error:
        return Found(reasons=(f"{_PREFIX}{index} left out: {error}",))
    device = Device(
        name=f"{_PREFIX}{index}",
        kind="cuda",
        total=int(memory.total),
        minimum=MINIMUM["cuda"],
        free=int(memory.free),
        description=name.decode(errors="replace") if isinstance(name, bytes) else name,
    )
    return Found((device,))


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
