"""The safetensors library as the judge of what a safetensors file is."""

from __future__ import annotations

from typing import NamedTuple

from safetensors import SafetensorError, deserialize


class Judged(NamedTuple):
    """What the library found in a file."""

    tensors: int
    tensor_bytes: int


def judge(content: bytes) -> Judged | None:
    """Let the library read a file; None where it refuses."""
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return Judged(len(found), sum(len(one["data"]) for _, one in found))
