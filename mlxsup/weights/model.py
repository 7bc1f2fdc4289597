"""What is known of a model's weights: the files, their tensors by size and type, and the few facts their headers tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from mlxsup.weights.reading import Path, readable

Format = Literal["safetensors", "gguf", "pipeline"]

_PACKED_SHARE: Final = 0.01
"""Integers in more than this share of the bytes are packed weights, of which a header does not tell how many they hold."""


class Tensor(msgspec.Struct, frozen=True):
    """One tensor as a header describes it; `elements` counts what is stored, packed or not."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    bytes: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What the header of one file says."""

    path: str
    tensors: tuple[Tensor, ...]
    context_length: int | None = None
    quantisation: str = ""

    @property
    def bytes(self) -> int:
        """The tensors' bytes."""
        return sum(tensor.bytes for tensor in self.tensors)


class File(msgspec.Struct, frozen=True):
    """One file of weights and the bytes of its tensors."""

    path: str
    bytes: int


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """How large a model is, from its headers.

    Attributes:
        path: the file, the folder or the manifest that was asked for, with links of a cache resolved.
        format: "safetensors", "gguf", or "pipeline" for folders of components that make pictures.
        files: each file of weights with the bytes of its tensors; they add up to `tensor_bytes`.
        tensor_bytes: all tensors' bytes, which is what a runner must hold.
        tensors: how many there are.
        parameters: how many numbers the model has; None where they are packed in a way that headers do not tell.
        largest: the largest tensor.
        dtypes: bytes by type of number, the most first.
        quantisation: one word or two, such as "Q4_K_M", "4-bit" or "BF16".
        context_length: tokens of context the model was made for, where its header or config says so.
    """

    path: str
    format: Format
    files: tuple[File, ...]
    tensor_bytes: int
    tensors: int
    parameters: int | None
    largest: Tensor | None
    dtypes: dict[str, int]
    quantisation: str
    context_length: int | None


def combine(
    path: Path, kind: Format, parts: Sequence[Part], *, quantisation: str = "", context_length: int | None = None
) -> Weights:
    """Add the parts of a model up; what is not said here is taken from the first part that says it."""
    tensors = [tensor for part in parts for tensor in part.tensors]
    dtypes = _by_dtype(tensors)
    total = sum(dtypes.values())
    return Weights(
        path=readable(path),
        format=kind,
        files=tuple(File(readable(part.path), part.bytes) for part in parts),
        tensor_bytes=total,
        tensors=len(tensors),
        parameters=_parameters(tensors, dtypes, total) if kind != "gguf" else sum(one.elements for one in tensors),
        largest=max(tensors, key=lambda tensor: tensor.bytes, default=None),
        dtypes=dtypes,
        quantisation=quantisation
        or next((part.quantisation for part in parts if part.quantisation), next(iter(dtypes), "")),
        context_length=context_length or next((part.context_length for part in parts if part.context_length), None),
    )


def _by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.dtype] += tensor.bytes
    return dict(count.most_common())


def _parameters(tensors: Iterable[Tensor], dtypes: Mapping[str, int], total: int) -> int | None:
    integers = sum(size for dtype, size in dtypes.items() if dtype[0] in "UI")
    if integers > _PACKED_SHARE * total:
        return None
    return sum(tensor.elements for tensor in tensors if tensor.dtype[0] not in "UI")
