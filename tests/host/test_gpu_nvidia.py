"""NVIDIA cards at the seam: a scripted library in the place of NVML. No machine with a card is at hand."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxsup.host import Found, devices, gpu_nvidia
from mlxsup.host.gpu_nvidia import NoAnswerError, find, look

from .trees import GIB, MIB, machine


class ScriptedError(Exception):
    """What the real library raises."""


class Script:
    """A library that answers as told, and notes that it is closed as often as it is opened."""

    NVMLError: type[Exception] = ScriptedError

    def __init__(self, *cards: dict[str, Any], fails: str = "") -> None:
        self.cards = cards
        self.fails = fails
        self.open = 0

    def _may(self, step: str) -> None:
        if step == self.fails:
            raise ScriptedError(f"{step} failed")

    def nvmlInit(self) -> None:  # noqa: N802
        self._may("init")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1
        self._may("shutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._may("count")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> dict[str, Any]:  # noqa: N802
        self._may(f"handle {index}")
        if index >= len(self.cards):
            raise ScriptedError("Invalid Argument")
        return self.cards[index]

    def nvmlDeviceGetName(self, handle: dict[str, Any], /) -> str | bytes:  # noqa: N802
        name: str | bytes = handle.get("name", "NVIDIA L4")
        return name

    def nvmlDeviceGetUUID(self, handle: dict[str, Any], /) -> str:  # noqa: N802
        if "uuid" not in handle:
            raise ScriptedError("Not Supported")
        uuid: str = handle["uuid"]
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any], /) -> Any:  # noqa: N802
        self._may("memory")
        if (gate := handle.get("hangs")) is not None:
            gate.wait()
        return SimpleNamespace(total=handle["total"], free=handle["free"], used=handle["total"] - handle["free"])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any], /) -> list[Any]:  # noqa: N802
        self._may("processes")
        if handle.get("unlisted"):
            raise ScriptedError("Insufficient Permissions")
        return list(handle.get("computing", []))

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: dict[str, Any], /) -> list[Any]:  # noqa: N802
        return list(handle.get("drawing", []))


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a driver for cards, all of which are ours."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    return machine(tmp_path)


def test_cards_are_devices(root: Path) -> None:
    script = Script({"total": 24 * GIB, "free": 20 * GIB}, {"total": 8 * GIB, "free": GIB, "name": b"Tesla\xff"})

    found = find(root=root, load=lambda: script)

    assert found.reasons == ()
    assert [(one.name, one.kind, one.total, one.minimum, one.free, one.description) for one in found.devices] == [
        ("cuda:0", "cuda", 24 * GIB, 457 * MIB, 20 * GIB, "NVIDIA L4"),
        ("cuda:1", "cuda", 8 * GIB, 457 * MIB, GIB, "Tesla\ufffd"),
    ]
    assert script.open == 0


def test_nothing_is_imported_where_there_is_no_sign_of_a_card(tmp_path: Path) -> None:
    def load() -> Script:
        raise AssertionError("imported")

    assert find(root=tmp_path, load=load) == Found()


@pytest.mark.parametrize("step", ["init", "count"])
def test_a_library_that_fails_is_a_reason_and_no_device(root: Path, step: str) -> None:
    script = Script({"total": GIB, "free": GIB}, fails=step)

    found = find(root=root, load=lambda: script)

    assert (found.devices, found.reasons) == ((), (f"no NVIDIA cards: {step} failed",))
    assert script.open == 0


def test_a_card_that_fails_is_left_out_alone(root: Path) -> None:
    script = Script({"total": GIB, "free": GIB}, {"total": GIB, "free": GIB}, fails="handle 0")

    found = find(root=root, load=lambda: script)

    assert [device.name for device in found.devices] == ["cuda:1"]
    assert found.reasons == ("cuda:0 left out: handle 0 failed",)
    assert find(root=root, load=lambda: Script({"total": 1, "free": 1}, fails="shutdown")).devices[0].total == 1


def test_processes_are_told_with_what_they_hold() -> None:
    script = Script(
        {
            "total": GIB,
            "free": GIB,
            "computing": [process(1, 100), process(2, None), process(3, 30)],
            "drawing": [process(1, 100), process(4, 40)],
        }
    )

    card = look("cuda:0", load=lambda: script)
    assert card.by_pid == {1: 100, 3: 30, 4: 40}
    assert (card.total, card.free, card.used) == (GIB, GIB, 0)
    assert script.open == 0


def test_what_is_free_is_told_where_processes_may_not_be_listed() -> None:
    card = {"total": GIB, "free": MIB, "computing": [process(1, 100)], "drawing": [process(4, 40)]}
    script = Script(card, fails="processes")
    seen = look("cuda:0", load=lambda: script)
    assert (seen.free, seen.used) == (MIB, GIB - MIB)
    assert seen.by_pid == {4: 40}
    assert script.open == 0


@pytest.mark.parametrize(
    ("name", "why"), [("cuda:7", "Invalid Argument"), ("cpu", "no NVIDIA card"), ("cuda:x", "no NVIDIA card")]
)
def test_a_card_that_is_not_there_is_an_error(name: str, why: str) -> None:
    script = Script({"total": GIB, "free": GIB})
    with pytest.raises(NoAnswerError, match=why):
        look(name, load=lambda: script)
    assert script.open == 0


def test_a_missing_library_is_a_reason_that_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)

    assert find(root=root).reasons == (
        "no NVIDIA cards: nvidia-ml-py is not installed; mend: pip install 'mlxsup[nvidia]'",
    )


@pytest.mark.skipif(not importlib.util.find_spec("pynvml"), reason="nvidia-ml-py is not installed")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a card")
def test_the_real_library_without_a_driver_is_a_reason(root: Path) -> None:
    assert find(root=root).reasons == ("no NVIDIA cards: NVML Shared Library Not Found",)


FOUR: list[dict[str, Any]] = [
    {"total": GIB, "free": GIB, "uuid": "GPU-11aa"},
    {"total": GIB, "free": GIB, "uuid": "GPU-22bb"},
    {"total": GIB, "free": GIB, "uuid": "GPU-22cc"},
    {"total": GIB, "free": GIB},
]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,2", [0, 2]),
        ("2,1", [1, 2]),
        ("0,2,-1,1", [0, 2]),
        (" 1 , 3 ", [1, 3]),
        ("1,1", [1]),
        ("", []),
        ("-1", []),
        ("4,0", []),
        ("NoDevFiles", []),
        ("9" * 5000, []),
        ("\u0661", []),
        ("GPU-11aa,GPU-22c", [0, 2]),
        ("GPU-1,3", [0, 3]),
        ("GPU-22", []),  # two of them
        ("GPU-33,0", []),
        ("0,MIG-GPU-11aa/1/0,1", [0]),
    ],
)
def test_cards_that_cuda_would_not_show_us_are_left_out(root: Path, value: str, expected: list[int]) -> None:
    script = Script(*FOUR)

    found = find(root=root, load=lambda: script, environ={"CUDA_VISIBLE_DEVICES": value})

    assert [device.name for device in found.devices] == [f"cuda:{index}" for index in expected]
    hidden = [index for index in range(4) if index not in expected]
    assert found.reasons == tuple(f"cuda:{index} left out: CUDA_VISIBLE_DEVICES does not name it" for index in hidden)


@pytest.mark.parametrize(
    ("value", "order", "kind", "warned"),
    [
        ("0", "FASTEST_FIRST", "NVIDIA T4", True),
        ("0", "", "NVIDIA T4", True),
        ("0", "PCI_BUS_ID", "NVIDIA T4", False),
        ("0", "", "NVIDIA L4", False),
        ("1,0", "", "NVIDIA T4", False),
        ("GPU-a", "", "NVIDIA T4", False),
    ],
)
def test_numbers_that_cuda_may_count_in_another_order_are_a_warning(
    root: Path, value: str, order: str, kind: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = {"total": GIB, "free": GIB, "uuid": "GPU-a", "name": "NVIDIA L4"}
    script = Script(one, one | {"uuid": "GPU-b", "name": kind})

    find(root=root, load=lambda: script, environ={"CUDA_VISIBLE_DEVICES": value, "CUDA_DEVICE_ORDER": order})

    assert ("name them by their UUIDs" in caplog.text) == warned


def test_a_library_that_is_broken_is_a_reason(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> gpu_nvidia.Library:
        raise ValueError("this is no library")

    assert find(root=root, load=load) == Found(reasons=("no NVIDIA cards: ValueError('this is no library')",))
    (said,) = caplog.records
    assert said.exc_info


def test_a_driver_that_hangs_when_it_is_asked_first_is_a_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_nvidia, "FIND_LIMIT", 0.1)
    gate = threading.Event()
    script = Script({"total": GIB, "free": GIB, "hangs": gate})
    try:
        found = find(root=root, load=lambda: script)
        assert found == Found(reasons=("no NVIDIA cards: their driver does not answer",))
    finally:
        gate.set()
        for thread in threading.enumerate():
            if thread.name == "mlxsup find cards":
                thread.join()


def test_cards_come_before_the_ram(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_nvidia, "_import", lambda: Script({"total": GIB, "free": GIB}))

    assert [device.name for device in devices(platform="linux", root=root).devices] == ["cuda:0", "cpu"]
