"""The GGUF format, versions 2 and 3: one file, or one split into `NAME-00001-of-00003.gguf` and so on.

A file is a magic word, counts, keys with values (the tokenizer among them: up to some megabytes), then name, shape, type and
offset of each tensor, then the tensors. Of the keys only a digest is kept, to find one that is there twice, and the values of
the few that tell something of the size.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection
from itertools import pairwise
from typing import Final

import msgspec

from mlxsup.weights.ggml import FILE_TYPES, REMOVED, TYPES
from mlxsup.weights.model import Part, Tensor, Weights, combine
from mlxsup.weights.reading import (
    FILES_LIMIT,
    HEADER_LIMIT,
    TENSORS_LIMIT,
    OpenFile,
    Path,
    UnreadableModel,
    brief,
    exists,
    opened,
    readable,
    unreadable,
)

SUFFIX: Final = ".gguf"
MAGIC: Final = b"GGUF"

_VERSIONS: Final = (2, 3)
_ITEMS_LIMIT: Final = 4_000_000
"""Strings in arrays of one file; the largest vocabularies have less than a million with their merges."""
_ARRAY_WEIGHT: Final = 40
"""An array in an array counts as so many strings; nobody writes them, the format allows them."""
_NAME_LIMIT: Final = 65_535
_DEPTH_LIMIT: Final = 4
_DIMENSIONS_LIMIT: Final = 4
_MOST_BYTES: Final = 2**63 - 1
_WINDOW: Final = 256 * 1024

_STRING, _ARRAY = 8, 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_PLACES: Final = ("split.no", "split.count", "split.tensors.count")
_ARCHITECTURE: Final = "general.architecture"
_FILE_TYPE: Final = "general.file_type"
_ALIGNMENT: Final = "general.alignment"
_CONTEXT_LENGTH: Final = ".context_length"
"""Behind the architecture, which may be told later than this."""
_NUMBERS: Final = (*_PLACES, _FILE_TYPE, _ALIGNMENT)


class _Facts(msgspec.Struct):
    """The values that are kept; 0 and "" where the file does not say."""

    alignment: int = 32
    architecture: str = ""
    file_type: int = -1
    context_length: int = 0
    split: tuple[int, int, int] = (0, 0, 0)


def measure_file(path: Path) -> Weights:
    """Measure a GGUF file; of a split one, all its files, whichever is named.

    Raises:
        UnreadableModel: one of them is no such file, not there, or not of the same set.
    """
    return combine(path, "gguf", read_set(path))


def read_set(path: Path) -> list[Part]:
    """Read the headers of a file and of the others it was split into.

    Raises:
        UnreadableModel: as in `measure_file`.
    """
    part, facts = _read(path)
    number, count, tensors = facts.split
    if count <= 1:
        return [part]
    name = _SPLIT.fullmatch(readable(path))
    if not name or int(name[3]) != count:
        raise unreadable(
            path, f"one of {count} files of a split model, but its name does not end in -NNNNN-of-{count:05}.gguf"
        )
    if count > FILES_LIMIT:
        raise unreadable(path, f"one of {count} files: not a model")
    parts = []
    for one in range(count):
        other = f"{name[1]}-{one + 1:05}-of-{count:05}.gguf"
        if not exists(other):
            raise unreadable(
                other, f"not there, but {name[1]}-{number + 1:05}-of-{count:05}.gguf is of the same set", missing=True
            )
        part, facts = _read(other)
        if facts.split[:2] != (one, count):
            raise unreadable(
                other, f"by its header part {facts.split[0] + 1} of {facts.split[1]}, by its name {one + 1} of {count}"
            )
        parts.append(part)
    there = sum(len(part.tensors) for part in parts)
    if there != tensors:
        raise unreadable(path, f"its set holds {there} tensors where its header says {tensors}")
    return parts


def read_file(path: Path) -> Part:
    """Read the header of one file that is whole: a part of a split model is refused.

    Raises:
        UnreadableModel: it is no such file.
    """
    part, facts = _read(path)
    if facts.split[1] > 1:
        raise unreadable(path, f"only part {facts.split[0] + 1} of {facts.split[1]} of a model")
    return part


def stands_for_its_set(name: str, names: Collection[str]) -> bool:
    """Tell whether a file is a model of its own, or the first of those of its set that are among `names`."""
    match = _SPLIT.fullmatch(name)
    return not match or not any(
        f"{match[1]}-{one:05}-of-{match[3]}{SUFFIX}" in names for one in range(1, int(match[2]))
    )


def _read(path: Path) -> tuple[Part, _Facts]:
    with opened(path) as file:
        cursor = _Cursor(file)
        magic, version = cursor.take(4), cursor.number(_U32)
        if magic != MAGIC:
            raise unreadable(path, "no GGUF: it does not begin with GGUF")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "big"), "little")
            what = "big-endian, for other machines" if big in _VERSIONS else f"GGUF version {version}"
            raise unreadable(path, f"{what}; versions 2 and 3 are read")
        tensor_count, key_count = cursor.number(_U64), cursor.number(_U64)
        for count, what in ((tensor_count, "tensors"), (key_count, "keys")):
            if count > TENSORS_LIMIT:
                raise unreadable(path, f"claims {count} {what}, where {TENSORS_LIMIT} is the limit")
        facts = _facts(cursor, key_count)
        tensors = _tensors(cursor, tensor_count, facts.alignment)
        return (
            Part(
                path=readable(path),
                tensors=tensors,
                context_length=facts.context_length or None,
                quantisation=FILE_TYPES.get(facts.file_type, ""),
            ),
            facts,
        )


def _facts(cursor: _Cursor, count: int) -> _Facts:
    values: dict[bytes, object] = {}
    for _ in range(count):
        key = cursor.name("key")
        digest = _digest(key)
        if digest in values:
            raise cursor.complaint(f"the key {brief(key)!r} is there twice")
        value = cursor.value(cursor.number(_U32))
        is_text = isinstance(value, str)
        wanted = key == _ARCHITECTURE if is_text else key in _NUMBERS or key.endswith(_CONTEXT_LENGTH)
        values[digest] = value if wanted else None
    facts = _Facts(split=tuple(_natural(cursor, values, key) for key in _PLACES))  # type: ignore[arg-type]
    architecture = values.get(_digest(_ARCHITECTURE))
    if isinstance(architecture, str):
        facts.architecture = architecture
        facts.context_length = _natural(cursor, values, architecture + _CONTEXT_LENGTH)
    if _digest(_FILE_TYPE) in values:
        facts.file_type = _natural(cursor, values, _FILE_TYPE)
    if _digest(_ALIGNMENT) in values:
        facts.alignment = _natural(cursor, values, _ALIGNMENT)
    if facts.alignment < 1 or facts.alignment & (facts.alignment - 1) or facts.alignment > 2**31:
        raise cursor.complaint(f"an alignment of {facts.alignment}, which is no power of two")
    return facts


def _digest(key: str) -> bytes:
    """Stand for a key that may have 64 KiB, or four times that once it is decoded."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _natural(cursor: _Cursor, values: dict[bytes, object], key: str) -> int:
    value = values.get(_digest(key), 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise cursor.complaint(f"the value of {brief(key)!r} is no natural number")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    placed: list[tuple[int, Tensor]] = []
    names = set()
    for _ in range(count):
        tensor, offset = _tensor(cursor)
        if tensor.name in names:
            raise cursor.complaint(f"tensor {brief(tensor.name)!r} is there twice")
        if offset % alignment:
            raise cursor.complaint(f"tensor {brief(tensor.name)!r} is not aligned to {alignment} bytes")
        names.add(tensor.name)
        placed.append((offset, tensor))
    placed.sort(key=lambda one: (one[0], one[1].bytes))
    for (offset, tensor), (following, other) in pairwise(placed):
        if offset + tensor.bytes > following:
            raise cursor.complaint(f"an overlap of tensors {brief(tensor.name)!r} and {brief(other.name)!r}")
    room = cursor.size - -(-cursor.position // alignment) * alignment
    needed = max((offset + tensor.bytes for offset, tensor in placed), default=0)
    if needed > max(room, 0):
        raise cursor.complaint(f"cut off: its tensors need {needed} bytes, {max(room, 0)} are there")
    return tuple(tensor for _, tensor in placed)


def _tensor(cursor: _Cursor) -> tuple[Tensor, int]:
    name = cursor.name("tensor")
    dimensions = cursor.number(_U32)
    if dimensions > _DIMENSIONS_LIMIT:
        raise cursor.complaint(
            f"tensor {brief(name)!r} has {dimensions} dimensions, at most {_DIMENSIONS_LIMIT} are possible"
        )
    shape = tuple(cursor.number(_U64) for _ in range(dimensions))
    number, offset = cursor.number(_U32), cursor.number(_U64)
    kind = TYPES.get(number)
    if kind is None:
        why = "which llama.cpp reads no longer" if number in REMOVED else "which is not known"
        raise cursor.complaint(f"tensor {brief(name)!r} is of type {number}, {why}")
    elements = 1
    for side in shape:
        elements *= side
        if elements > _MOST_BYTES:
            raise cursor.complaint(f"tensor {brief(name)!r} has an impossible shape")
    if (shape[0] if shape else 1) % kind.block:
        raise cursor.complaint(
            f"tensor {brief(name)!r} has rows of {shape[:1]} numbers, but {kind.name} has blocks of {kind.block}"
        )
    return Tensor(name, kind.name, shape, elements, elements // kind.block * kind.bytes), offset


class _Cursor:
    """Walks over a header through a window, so that what is skipped is never read."""

    def __init__(self, file: OpenFile) -> None:
        self.position = 0
        self.size = file.size
        self._file = file
        self._window = b""
        self._base = 0
        self._items_left = _ITEMS_LIMIT

    def complaint(self, why: str) -> UnreadableModel:
        return unreadable(self._file.path, why)

    def take(self, count: int) -> bytes:
        """Read some bytes and step behind them."""
        start = self._have(count)
        self.position += count
        return self._window[start : start + count]

    def number(self, kind: struct.Struct) -> int:
        """Read one number and step behind it."""
        start = self._have(kind.size)
        self.position += kind.size
        value: int = kind.unpack_from(self._window, start)[0]
        return value

    def name(self, what: str) -> str:
        """Read the name of a key or a tensor."""
        length = self.number(_U64)
        if length > _NAME_LIMIT:
            raise self.complaint(f"the name of a {what} has {length} bytes, where {_NAME_LIMIT} is the limit")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.complaint(f"the name of a {what} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> object:
        """Step over a value; return it when it is a number or a short string, else None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = self.number(_U64)
            if length <= _NAME_LIMIT:
                return self.take(length).decode(errors="replace")
            self._skip(length)
            return None
        if kind != _ARRAY:
            raise self.complaint(f"a value of the unknown type {kind}")
        self._skip_array(depth + 1)
        return None

    def _skip_array(self, depth: int) -> None:
        kind, count = self.number(_U32), self.number(_U64)
        if depth > _DEPTH_LIMIT:
            raise self.complaint("arrays nested too deeply")
        if kind in _SCALARS:
            self._skip(count * _SCALARS[kind].size)
            return
        self._items_left -= count if kind == _STRING else count * _ARRAY_WEIGHT
        if self._items_left < 0:
            raise self.complaint(
                f"arrays with more than {_ITEMS_LIMIT} strings, or {_ITEMS_LIMIT // _ARRAY_WEIGHT} arrays"
            )
        if kind == _STRING:
            self._skip_strings(count)
            return
        for _ in range(count):
            self.value(kind, depth)

    def _skip_strings(self, count: int) -> None:
        unpack = _U64.unpack_from
        while count:
            at = self._have(8)
            window = self._window
            try:  # a test of each string against the window's end would double the time of a large vocabulary
                for left in range(count, 0, -1):
                    count = left
                    at += 8 + unpack(window, at)[0]
                count = 0
            except (struct.error, OverflowError):
                pass
            self.position = self._base + at
        self._skip(0)

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > min(self.size, HEADER_LIMIT):
            raise self._past_the_end()

    def _have(self, count: int) -> int:
        """Make sure that the next `count` bytes are in the window; return where in it they begin."""
        start = self.position - self._base
        if start + count > len(self._window):
            limit = min(self.size, HEADER_LIMIT)
            if self.position + count > limit:
                raise self._past_the_end()
            self._base = self.position
            self._window = self._file.at(self._base, min(max(count, _WINDOW), limit - self._base))
            start = 0
        return start

    def _past_the_end(self) -> UnreadableModel:
        if self.size > HEADER_LIMIT:
            return self.complaint(f"a header of more than {HEADER_LIMIT} bytes")
        return self.complaint(f"cut off: its header goes on past the end of its {self.size} bytes")
