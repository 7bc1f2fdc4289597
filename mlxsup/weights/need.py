"""How much memory a model will need: as declared, else as learnt, else the sum of what is known about it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mlxsup.weights.model import Weights


class Margin(msgspec.Struct, frozen=True, kw_only=True):
    """What an estimate adds for what nobody can know beforehand: the larger of a share of the tensors and a floor in bytes."""

    share: float = 0.05
    floor: int = 256 * 1024**2

    def of(self, tensor_bytes: int) -> int:
        """Return the bytes to add."""
        return max(self.floor, round(self.share * tensor_bytes))


MARGIN: Final = Margin()
"""Our choice. The floor covers interpreter and libraries of a Python runner with room to spare (measured: `mlx_lm.server` 81 MiB
before its weights, our own with its small model 60); the share covers what allocators round up and keep."""

TEXT_SHARE: Final = 0.2
"""Context and activations of a text model, as a share of its weights, where its engine knows nothing better: memory of
inference is about 1.2 times that of the model ("Transformer Math 101", EleutherAI; `accelerate estimate-memory` says the same).
"""

IMAGE_BYTES_PER_PIXEL: Final = 9728
"""Decoding latents in one piece, which is when picture pipelines need most. Published measurements of mflux on Apple silicon:
9,629 MB at 1024 x 1024 (9.2 to 9.6 kB a pixel) and up to 21 GB at 1536 x 1536 (8.9) for the autoencoder of FLUX.2, above
1.5 GB for denoising. In tiles it is less than a third: an engine that tiles hands in its own figure."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes a model needs on its device, and where the figure comes from.

    Attributes:
        total: what is reserved.
        source: "declared" by the configuration, "learnt" from an earlier load, or "estimated" as the sum of the other three.
        tensors: bytes of its tensors, 0 where its files were not read.
        working_set: bytes of context, activations, buffers; 0 unless estimated, as is `margin`.
        margin: bytes for what is not known.
        estimate: the sum of the three where what was learnt wins over it, else 0.
    """

    total: int
    source: Literal["declared", "learnt", "estimated"]
    tensors: int = 0
    working_set: int = 0
    margin: int = 0
    estimate: int = 0


def need(
    weights: Weights | None,
    *,
    declared: int | None = None,
    learnt: int | None = None,
    working_set: int = 0,
    margin: Margin = MARGIN,
) -> Need:
    """Say what a model needs.

    Args:
        weights: its files; None only where `declared` or `learnt` is given.
        declared: what the configuration says (`memory = "12GiB"`), which wins.
        learnt: what an earlier load of the same files took, which comes next.
        working_set: what the engine needs beside the tensors, as `text_working_set` or `image_working_set` has it.
        margin: what to add for the unknown.

    Raises:
        ValueError: nothing is known.
    """
    tensors = weights.tensor_bytes if weights else 0
    added = margin.of(tensors)
    total = tensors + working_set + added
    if declared is not None:
        return Need(total=declared, source="declared", tensors=tensors)
    if learnt is not None:
        return Need(total=learnt, source="learnt", tensors=tensors, estimate=total if weights else 0)
    if weights is None:
        raise ValueError("a need without weights must be declared or learnt")
    return Need(total=total, source="estimated", tensors=tensors, working_set=working_set, margin=added)


def text_working_set(weights: Weights, *, share: float = TEXT_SHARE) -> int:
    """Return the bytes a text model takes beside its tensors, by the rule of thumb."""
    return round(share * weights.tensor_bytes)


def image_working_set(width: int, height: int, *, bytes_per_pixel: int = IMAGE_BYTES_PER_PIXEL) -> int:
    """Return the bytes a pipeline takes beside its tensors to make one picture of that size in pixels."""
    return width * height * bytes_per_pixel
