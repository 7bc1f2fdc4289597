"""What a device is: how much memory it has, how much of it is free, and whether a need fits (pure, no look at the machine)."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mlxsup.config import format_size, rounded_size
from mlxsup.errors import DoesNotFit

Kind = Literal["cpu", "cuda", "metal"]

_MIB: Final = 1024**2
MINIMUM: Final[dict[Kind, int]] = {"cpu": 457 * _MIB, "cuda": 457 * _MIB, "metal": 512 * _MIB}
"""Kept free on a device for what drivers and contexts take of it, whatever the model; the figures Ollama uses."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One place where models live; all figures in bytes.

    Attributes:
        name: "cpu", "metal", or "cuda:N" with NVML's number, which is the order of the PCI bus.
        kind: what it is.
        total: what it has, within the limits set for this process.
        minimum: what is never given to models.
        free: what is not in use now, within the same limits.
        description: what the maker calls it, where known.
    """

    name: str
    kind: Kind
    total: int
    minimum: int
    free: int
    description: str = ""

    def available(self, overhead: int = 0) -> int:
        """Return what models may take of it now, with `overhead` kept free beyond the minimum; never below 0."""
        return max(0, self.free - self.minimum - overhead)

    def emptied(self) -> Device:
        """Return it as it would be with nothing on it: what does not fit then never will."""
        return msgspec.structs.replace(self, free=self.total)


class Found(msgspec.Struct, frozen=True):
    """Devices that were looked for, and a line for each that is not there or not to be trusted, with the reason."""

    devices: tuple[Device, ...] = ()
    reasons: tuple[str, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.devices + other.devices, self.reasons + other.reasons)


def fits(need: int, device: Device, overhead: int = 0) -> None:
    """Check that `need` bytes fit on a device as it is; ask `device.emptied()` whether they ever could.

    Args:
        need: bytes.
        device: with what is free on it.
        overhead: bytes that are kept free beyond the device's minimum.

    Raises:
        DoesNotFit: they do not; `details` have the figures in bytes.
    """
    available = device.available(overhead)
    if need <= available:
        return
    kept = device.minimum + overhead
    shown, there = rounded_size(need), rounded_size(available)
    if shown == there:  # `requires 4.0 GiB but only 4.0 GiB` would help nobody
        shown, there = format_size(need), format_size(available)
    raise DoesNotFit(
        f"model requires {shown} but only {there} are available (after {rounded_size(kept)} overhead)",
        details={"device": device.name, "required": need, "available": available, "overhead": kept},
    )
