"""Small model files for the tests: some honest, made byte by byte, so that each byte can also be a lie."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I64": 8, "U8": 1}

STRING, ARRAY, U16, I32, U32 = 8, 9, 2, 5, 4
F32, F16, Q4_K = 0, 1, 12


def safetensors(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None, *, data: bool = True
) -> bytes:
    """Make a file of such tensors, one after the other; without data, only its header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, size = end, SIZES[dtype]
        for side in shape:
            size *= side
        end += size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return framed(json.dumps(header).encode()) + (b"\1" * end if data else b"")


def framed(header: bytes, *, length: int | None = None) -> bytes:
    """Put a header's length in front of it."""
    return struct.pack("<Q", len(header) if length is None else length) + header


def entry(dtype: str = "F32", shape: Sequence[object] = (1,), offsets: Sequence[object] = (0, 4)) -> dict[str, object]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(content: str | bytes) -> bytes:
    """A GGUF string."""
    raw = content.encode() if isinstance(content, str) else content
    return u64(len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    """A GGUF key with its value."""
    return text(name) + u32(kind) + value


def number(name: str, value: int, kind: int = U32) -> bytes:
    """A GGUF key with a number."""
    return key(name, kind, struct.pack({U16: "<H", I32: "<i", U32: "<I"}[kind], value))


def tensor(name: str, shape: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """What a GGUF header says of one tensor."""
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """Make a GGUF file; `counts` are what it claims to have of tensors and keys."""
    claimed = counts or (len(tensors), len(keys))
    header = b"GGUF" + u32(version) + u64(claimed[0]) + u64(claimed[1]) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + b"\1" * data


def split_keys(one: int, count: int, tensors: int) -> list[bytes]:
    """The keys of a part of a split GGUF model."""
    return [
        number("split.no", one, U16),
        number("split.count", count, U16),
        number("split.tensors.count", tensors, I32),
    ]


def write(path: Path, content: bytes | str | object) -> Path:
    """Write a file and the folders above it; what is no bytes is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def blob(store: Path, content: bytes) -> dict[str, object]:
    """Put a blob into an Ollama store; return its digest and size for a layer."""
    digest = hashlib.sha256(content).hexdigest()
    write(store / "blobs" / f"sha256-{digest}", content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def layer(store: Path, content: bytes, kind: str = "model", **more: object) -> dict[str, object]:
    """Put a layer into an Ollama store and return what the manifest says of it."""
    return {"mediaType": f"application/vnd.ollama.image.{kind}", **blob(store, content), **more}


def manifest(*layers: Mapping[str, object], **more: object) -> dict[str, object]:
    """An Ollama manifest."""
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": "sha256:0", "size": 2},
        "layers": list(layers),
        **more,
    }
