"""Metal's share of memory, from recorded answers of sysctl: no machine of that kind is at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from mlxsup.host import devices, gpu_metal
from mlxsup.host.gpu_metal import find, run_sysctl, working_set

from .trees import GIB, MIB

M3_MAX = {
    "hw.optional.arm64": "1\n",
    "hw.memsize": f"{64 * GIB}\n",
    "iogpu.wired_limit_mb": "0\n",
    "machdep.cpu.brand_string": "Apple M3 Max\n",
}


@pytest.mark.parametrize(
    ("memory", "wired", "expected"),
    [
        (8, 0, 8 * GIB * 2 // 3),
        (16, 0, 16 * GIB * 2 // 3),
        (36, 0, 24 * GIB),
        (48, 0, 36 * GIB),
        (64, 0, 48 * GIB),
        (128, 0, 96 * GIB),
        (64, 56_000, 56_000 * MIB),
        (64, 1_000_000, 64 * GIB),
        (16, -1, 16 * GIB * 2 // 3),
    ],
)
def test_the_working_set_is_what_is_set_or_a_share(memory: int, wired: int, expected: int) -> None:
    assert working_set(memory * GIB, wired_limit_mb=wired) == expected


def test_the_device_has_no_more_free_than_the_machine() -> None:
    found = find(available=10 * GIB, sysctl=M3_MAX.get)

    (device,) = found.devices
    assert (device.name, device.kind, device.description) == ("metal", "metal", "Apple M3 Max")
    assert (device.total, device.minimum, device.free) == (48 * GIB, 512 * MIB, 10 * GIB)
    assert find(available=60 * GIB, sysctl=M3_MAX.get).devices[0].free == 48 * GIB


def test_systems_without_the_setting_have_the_share() -> None:
    answers = {name: value for name, value in M3_MAX.items() if name != "iogpu.wired_limit_mb"}

    assert find(available=60 * GIB, sysctl=answers.get).devices[0].total == 48 * GIB
    garbage = {**M3_MAX, "iogpu.wired_limit_mb": "many\n"}
    assert find(available=60 * GIB, sysctl=garbage.get).devices[0].total == 48 * GIB


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({}, "no Metal: this Mac has no Apple silicon"),
        ({**M3_MAX, "hw.optional.arm64": "0"}, "no Metal: this Mac has no Apple silicon"),
        ({"hw.optional.arm64": "1"}, "no Metal: sysctl does not tell hw.memsize"),
        ({**M3_MAX, "hw.memsize": "much"}, "no Metal: sysctl does not tell hw.memsize"),
    ],
)
def test_without_an_answer_there_is_no_device_but_a_reason(answers: dict[str, str], why: str) -> None:
    found = find(available=GIB, sysctl=answers.get)

    assert (found.devices, found.reasons) == ((), (why,))


def test_on_apple_silicon_metal_stands_for_the_ram_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_metal, "run_sysctl", M3_MAX.get)

    found = devices(platform="darwin", root=tmp_path)

    assert [device.name for device in found.devices] == ["metal"]
    assert found.devices[0].free <= psutil.virtual_memory().total


def test_on_other_macs_there_is_only_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_metal, "run_sysctl", {}.get)

    found = devices(platform="darwin", root=tmp_path)

    assert [device.name for device in found.devices] == ["cpu"]
    assert found.reasons == ("no Metal: this Mac has no Apple silicon",)


@pytest.mark.skipif(sys.platform == "darwin", reason="asks for what other systems do not have")
def test_asking_a_system_without_the_key_answers_nothing() -> None:
    assert run_sysctl("hw.memsize.nothing") is None
