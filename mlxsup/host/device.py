"""What a device is: how much memory it has, and how much of it is free (pure, no look at the machine)."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

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


class Found(msgspec.Struct, frozen=True):
    """Devices that were looked for, and a line for each that is not there or not to be trusted, with the reason."""

    devices: tuple[Device, ...] = ()
    reasons: tuple[str, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.devices + other.devices, self.reasons + other.reasons)
