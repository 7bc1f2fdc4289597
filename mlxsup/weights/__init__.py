"""How large a model is, from the headers of its files alone, and how much memory it will need.

`measure` takes a path or a name and answers with Weights; `need` makes of them what has to be reserved. Both are blind to
engines: what an engine takes beside the tensors is handed in.
"""

from __future__ import annotations

from mlxsup.weights.measuring import measure
from mlxsup.weights.model import File, Format, Part, Tensor, Weights
from mlxsup.weights.need import (
    IMAGE_BYTES_PER_PIXEL,
    MARGIN,
    TEXT_SHARE,
    Margin,
    Need,
    image_working_set,
    need,
    text_working_set,
)
from mlxsup.weights.ollama_store import default_store
from mlxsup.weights.reading import UnreadableModel
from mlxsup.weights.snapshot import default_cache

__all__ = [
    "IMAGE_BYTES_PER_PIXEL",
    "MARGIN",
    "TEXT_SHARE",
    "File",
    "Format",
    "Margin",
    "Need",
    "Part",
    "Tensor",
    "UnreadableModel",
    "Weights",
    "default_cache",
    "default_store",
    "image_working_set",
    "measure",
    "need",
    "text_working_set",
]
