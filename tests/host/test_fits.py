"""Whether a need fits on a device, and what is said when it does not."""

from __future__ import annotations

import pytest

from mlxsup import host
from mlxsup.errors import DoesNotFit
from mlxsup.host import MINIMUM, Device

GIB = 1024**3
MIB = 1024**2


def card(free: int, total: int = 24 * GIB) -> Device:
    return Device(name="cuda:0", kind="cuda", total=total, minimum=457 * MIB, free=free)


def test_what_is_left_beyond_the_minimum_and_the_overhead_is_available() -> None:
    device = card(8 * GIB)
    assert device.available(GIB) == 7 * GIB - 457 * MIB
    host.fits(7 * GIB - 457 * MIB, device, GIB)
    host.fits(0, card(0))
    with pytest.raises(DoesNotFit):
        host.fits(7 * GIB - 457 * MIB + 1, device, GIB)


def test_the_error_says_what_is_needed_there_and_kept() -> None:
    with pytest.raises(DoesNotFit) as caught:
        host.fits(12 * GIB, card(8 * GIB), GIB)

    assert caught.value.message == "model requires 12.0 GiB but only 6.6 GiB are available (after 1.4 GiB overhead)"
    assert caught.value.details == {
        "device": "cuda:0",
        "required": 12 * GIB,
        "available": 7 * GIB - 457 * MIB,
        "overhead": GIB + 457 * MIB,
    }
    assert caught.value.status == 507


def test_a_negative_remainder_counts_as_nothing() -> None:
    assert card(100 * MIB).available(GIB) == 0
    with pytest.raises(DoesNotFit, match=r"requires 1 B but only 0 B are available \(after 457\.0 MiB overhead\)"):
        host.fits(1, card(100 * MIB))


def test_figures_that_look_alike_are_written_out() -> None:
    device = card(4 * GIB + 457 * MIB)
    with pytest.raises(DoesNotFit, match=r"requires 4294967297B but only 4GiB are available"):
        host.fits(4 * GIB + 1, device)


def test_an_emptied_device_tells_what_could_ever_fit() -> None:
    device = card(0)
    host.fits(23 * GIB, device.emptied())
    with pytest.raises(DoesNotFit):
        host.fits(24 * GIB, device.emptied())


def test_minimums_are_those_of_the_contract() -> None:
    assert MINIMUM == {"cpu": 457 * MIB, "cuda": 457 * MIB, "metal": 512 * MIB}
