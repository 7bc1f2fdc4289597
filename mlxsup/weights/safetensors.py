"""The safetensors format: one file, or a folder of them with or without an index.

A file is eight bytes that tell the header's length, the header (JSON: name, dtype, shape, offsets of each tensor), and the
tensors, back to back without a gap. What the `safetensors` library refuses is refused here, and a key that is there twice.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Final

import msgspec

from mlxsup.weights.model import Part, Tensor, Weights, combine
from mlxsup.weights.reading import (
    FILES_LIMIT,
    HEADER_LIMIT,
    TENSORS_LIMIT,
    Folder,
    OpenFile,
    Path,
    brief,
    exists,
    json_file,
    loose_json_file,
    opened,
    readable,
    strict_json,
    unreadable,
)

SUFFIX: Final = ".safetensors"
CONFIG: Final = "config.json"

_BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one number, by the names of safetensors 0.8."""

_MOST_ELEMENTS: Final = 2**63 - 1
_METADATA: Final = "__metadata__"
_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w-]+)?\.safetensors$")
_PLAIN_INDEXES: Final = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_header = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)
_metadata = msgspec.json.Decoder(dict[str, str] | None)


def is_in(folder: Folder) -> bool:
    """Tell whether a folder has such files, or an index of them."""
    return bool(folder.ending(SUFFIX)) or any(map(_INDEX.search, folder.files))


def measure_file(path: Path) -> Weights:
    """Measure one .safetensors file.

    Raises:
        UnreadableModel: it is no such file.
    """
    return combine(path, "safetensors", [read_file(path)])


def measure_folder(folder: Folder) -> Weights:
    """Measure a folder of .safetensors files; `config.json` beside them may tell context length and quantisation.

    Raises:
        UnreadableModel: one of the files, the index or the config cannot be read, or a shard is not there.
    """
    context_length, quantisation = _config(folder)
    parts = read_folder(folder)
    return combine(folder.path, "safetensors", parts, quantisation=quantisation, context_length=context_length)


def read_folder(folder: Folder) -> list[Part]:
    """Read the headers of what a loader would load from a folder.

    Files that an index names, or all of them without one that fits; then a variant (`model.fp16.safetensors`) beside its plain form
    and `consolidated*` beside `model*` are left out, as loaders do: they hold the same weights again.

    Raises:
        UnreadableModel: as in `measure_folder`.
    """
    index = _index_of(folder)
    named = _named_by(folder, index) if index else []
    if index and not _is_of_another(folder, index, named):
        return [read_file(_there(folder, index, name)) for name in named]
    names = _without_doubles(folder.ending(SUFFIX))
    _require_whole_sets(folder, names)
    if len(names) > FILES_LIMIT:
        raise unreadable(folder.path, f"more than {FILES_LIMIT} files of weights: not the folder of a model")
    return [read_file(folder.inside(name)) for name in names]


def read_file(path: Path) -> Part:
    """Read one file's header.

    Raises:
        UnreadableModel: it is not safetensors, or its tensors are not where and what the header says.
    """
    with opened(path) as file:
        length = int.from_bytes(file.at(0, 8), "little")
        if length > HEADER_LIMIT:
            raise unreadable(path, f"no safetensors: a header of {length} bytes, where {HEADER_LIMIT} is the limit")
        raw = file.at(8, length)
        return Part(path=readable(path), tensors=_tensors(file, raw, file.size - 8 - length))


def _tensors(file: OpenFile, raw: bytes, room: int) -> tuple[Tensor, ...]:
    header = strict_json(file.path, raw, _header)
    if _METADATA in header:
        strict_json(file.path, bytes(header.pop(_METADATA)), _metadata)
    if len(header) > TENSORS_LIMIT:
        raise unreadable(file.path, f"more than {TENSORS_LIMIT} tensors")
    placed = sorted((_placed(file, name, entry) for name, entry in header.items()), key=lambda one: one[0])
    _require_seamless(file, placed, room)
    return tuple(tensor for _, tensor in placed)


def _placed(file: OpenFile, name: str, raw: msgspec.Raw) -> tuple[tuple[int, int], Tensor]:
    shown = brief(name)
    try:
        entry = _entry.decode(raw)
    except RecursionError as error:
        raise unreadable(file.path, f"tensor {shown!r} is nested too deeply") from error
    except ValueError as error:
        raise unreadable(file.path, f"tensor {shown!r}: {error}") from error
    begin, end = entry.data_offsets
    bits = _BITS.get(entry.dtype)
    if bits is None:
        raise unreadable(file.path, f"tensor {shown!r} is of the unknown type {brief(entry.dtype)!r}")
    if begin < 0 or end < begin:
        raise unreadable(file.path, f"tensor {shown!r} is at the impossible place [{begin}, {end}]")
    elements = 1
    for side in entry.shape:
        elements *= side
        if side < 0 or elements > _MOST_ELEMENTS:
            raise unreadable(file.path, f"tensor {shown!r} has an impossible shape")
    if elements * bits != 8 * (end - begin):
        raise unreadable(
            file.path, f"tensor {shown!r} has room for {end - begin} bytes, but its shape needs {elements * bits / 8:g}"
        )
    return (begin, end), Tensor(name, entry.dtype, tuple(entry.shape), elements, end - begin)


def _require_seamless(file: OpenFile, placed: list[tuple[tuple[int, int], Tensor]], room: int) -> None:
    if placed and placed[0][0][0] != 0:
        raise unreadable(file.path, f"a gap before tensor {brief(placed[0][1].name)!r}")
    for ((_, end), one), ((begin, _), other) in pairwise(placed):
        if begin != end:
            what = "a gap between" if begin > end else "an overlap of"
            raise unreadable(file.path, f"{what} tensors {brief(one.name)!r} and {brief(other.name)!r}")
    needed = placed[-1][0][1] if placed else 0
    if needed > room:
        raise unreadable(file.path, f"cut off: its tensors need {needed} bytes, {room} are there")
    if needed < room:
        raise unreadable(file.path, f"{room - needed} bytes at its end belong to no tensor")


# Folders


def _index_of(folder: Folder) -> str | None:
    """Choose the index: the plain one, else the only one."""
    found = [name for name in folder.files if _INDEX.search(name)]
    plain = [name for name in _PLAIN_INDEXES if name in found]
    if len(plain or found) > 1:
        raise unreadable(folder.path, f"more than one index: {', '.join((plain or found)[:5])}")
    return next(iter(plain or found), None)


def _named_by(folder: Folder, index: str) -> list[str]:
    path = folder.inside(index)
    names = sorted(set(json_file(path, _Index).weight_map.values()))
    if len(names) > FILES_LIMIT:
        raise unreadable(path, f"names more than {FILES_LIMIT} files")
    for name in names:
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise unreadable(path, f"names the file {brief(name)!r}, which is not below its folder")
    return names


def _is_of_another(folder: Folder, index: str, named: list[str]) -> bool:
    """Tell an index that was copied along from the model that this one was made of, as quantised ones often have it.

    Then no file that it names is there, but others of its kind are: `model*` beside `model.safetensors.index.json`. mlx-lm
    loads these without a look at the index, transformers prefers `model.safetensors` to any.
    """
    stem = _INDEX.sub("", index)
    others = any(name.startswith(stem) for name in folder.ending(SUFFIX))
    return others and not any(exists(folder.inside(name)) for name in named)


def _there(folder: Folder, index: str, name: str) -> str:
    path = folder.inside(name)
    if not exists(path):
        raise unreadable(path, f"not there, but {index} names it", missing=True)
    return path


def _without_doubles(names: list[str]) -> list[str]:
    plain = {name.removesuffix(SUFFIX) for name in names}
    kept = [name for name in names if name.removesuffix(SUFFIX).rpartition(".")[0] not in plain]
    if any(name.startswith("model") for name in kept):
        kept = [name for name in kept if not name.startswith("consolidated")]
    return kept


def _require_whole_sets(folder: Folder, names: list[str]) -> None:
    there = set(names)
    for match in filter(None, map(_SHARD.fullmatch, names)):
        stem, number, count, variant = match.groups()
        if not 1 <= int(number) <= int(count):
            raise unreadable(folder.inside(match[0]), "its name counts past the end of its set")
        number_before = int(number) - 1 or int(count)  # each shard vouches for the one before it, in a ring
        other = f"{stem}-{number_before:05}-of-{count}{variant or ''}{SUFFIX}"
        if other not in there:
            raise unreadable(folder.inside(other), f"not there, but {match[0]} is of the same set", missing=True)


def _config(folder: Folder) -> tuple[int | None, str]:
    """Read context length and quantisation from `config.json`, as transformers and mlx-lm write them."""
    if CONFIG not in folder.files:
        return None, ""
    config = loose_json_file(folder.inside(CONFIG))
    return context_length(config), _quantisation(config)


def context_length(config: dict[str, Any]) -> int | None:
    """Find the context length in a model's config, where it has one."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
            value = place.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
                return value
    return None


def _quantisation(config: dict[str, Any]) -> str:
    for key in ("quantization", "quantization_config"):
        found = config.get(key)
        if isinstance(found, dict):
            method, bits = found.get("quant_method"), found.get("bits")
            words = [method] if isinstance(method, str) and len(method) < 32 else []
            words += [f"{bits}-bit"] if isinstance(bits, int) and 0 < bits <= 64 else []
            if words:
                return " ".join(words)
    return ""
