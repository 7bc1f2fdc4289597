"""What may be selected beside a model's name: how its weights are changed as they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BITS = (3, 4, 5, 6, 8)
"""Bits a weight may be quantised to, as mflux has them."""


class NoSuchModelError(Exception):
    """What was selected is nothing that can be loaded; the message is one line."""


@dataclass(frozen=True)
class Lora:
    """A LoRA: the path of its safetensors file, and how strongly it is applied."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True)
class Adaptation:
    """How weights are changed as they are loaded.

    Attributes:
        quantize: bits of a weight, one of `BITS`; None leaves them as they are stored.
        loras: added to the transformer's weights, one after the other.
    """

    quantize: int | None = None
    loras: tuple[Lora, ...] = ()

    def check(self) -> None:
        """Look whether the files are there.

        Raises:
            NoSuchModelError: they are not, or there is no such quantisation.
        """
        if self.quantize is not None and self.quantize not in BITS:
            raise NoSuchModelError(f"no quantisation to {self.quantize} bits; there is {', '.join(map(str, BITS))}")
        for lora in self.loras:
            if not Path(lora.path).expanduser().is_file():
                raise NoSuchModelError(f"no LoRA at {lora.path}: there is no such file")


AS_STORED = Adaptation()


def paired(paths: Sequence[str], scales: Sequence[float]) -> tuple[Lora, ...]:
    """Put paths and scales of LoRAs together; without scales each is applied as it is.

    Raises:
        NoSuchModelError: there are more of the one than of the other.
    """
    if scales and len(scales) != len(paths):
        raise NoSuchModelError(f"{len(paths)} LoRAs and {len(scales)} scales: give one scale for each, or none")
    return tuple(map(Lora, paths, scales or [1.0] * len(paths)))
