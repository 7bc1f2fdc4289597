"""Whatever bytes a file has, the answer is a result or an UnreadableModel, soon; and what the libraries read is read alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsup.weights import Weights

from .complaints import measured_or_refused
from .judge import judge
from .making import (
    ARRAY,
    F16,
    STRING,
    framed,
    key,
    layer,
    manifest,
    number,
    split_keys,
    tensor,
    text,
    u32,
    u64,
    write,
)
from .making import gguf as made_gguf
from .making import safetensors as made_safetensors

SAFETENSORS = made_safetensors({"a.weight": ("F32", [3, 2]), "b": ("BF16", []), "c": ("U8", [0])}, {"format": "np"})
GGUF = made_gguf(
    [
        key("general.architecture", STRING, text("llama")),
        number("llama.context_length", 4096),
        key("tokens", ARRAY, u32(STRING) + u64(3) + text("a") + text("") + text("ccc")),
        key("nested", ARRAY, u32(ARRAY) + u64(1) + u32(4) + u64(2) + bytes(8)),
        *split_keys(0, 1, 0),
    ],
    [tensor("a", [8, 2], F16), tensor("b", [256], 12, 32)],
    32 + 144,
)

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]
edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 10**6), st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255))),
        st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(0, 64)),
        st.tuples(st.just("add"), st.integers(0, 10**6), st.integers(0, 64)),
        st.tuples(st.just("copy"), st.integers(0, 10**6), st.integers(0, 64)),
        st.tuples(st.just("end"), st.integers(0, 10**6), st.just(0)),
        st.tuples(
            st.just("u64"), st.integers(0, 10**6), st.sampled_from([0, 1, 8, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
        ),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """Change some bytes of a file: one, a stretch, or a number of eight."""
    raw = bytearray(content)
    for what, where, value in changes:
        at = where % (len(raw) + 1)
        if what == "set" and at < len(raw):
            raw[at] = value
        elif what == "cut":
            del raw[at : at + value]
        elif what == "add":
            raw[at:at] = bytes(value)
        elif what == "copy":
            raw[at:at] = raw[at : at + value]
        elif what == "end":
            del raw[at:]
        elif what == "u64":
            raw[at : at + 8] = u64(value)
    return bytes(raw)


@contextmanager
def folder() -> Iterator[Path]:
    """Give each example a place of its own."""
    with TemporaryDirectory() as path:
        yield Path(path)


@given(edits)
@settings(max_examples=300)
def test_a_mutated_safetensors_file_is_read_as_the_library_reads_it(changes: list[tuple[str, int, int]]) -> None:
    content = mutated(SAFETENSORS, changes)
    with folder() as place:
        found = measured_or_refused(write(place / "m.safetensors", content))
    agree(content, found)


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "I64", "U32", "X"]),
                "shape": st.lists(
                    st.one_of(st.integers(-1, 9), st.sampled_from([2**31, 2**62, 2**64, 0.5])), max_size=3
                ),
                "data_offsets": st.lists(
                    st.one_of(st.integers(-1, 40), st.sampled_from([2**63, 1e9])), min_size=1, max_size=3
                ),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 64),
)
@settings(max_examples=300)
def test_any_header_is_read_as_the_library_reads_it(header: dict[str, object], data: int) -> None:
    content = framed(json.dumps(header).encode()) + bytes(data)
    with folder() as place:
        found = measured_or_refused(write(place / "m.safetensors", content))
    agree(content, found)


def agree(content: bytes, found: object) -> None:
    """Hold a result against the library's; it takes some odd forms and keys that are there twice, which we do not."""
    judged = judge(content)
    if isinstance(found, Weights):
        assert (found.tensors, found.tensor_bytes) == judged
    elif judged:
        assert "is there twice" in str(found) or "Expected" in str(found)


@given(edits)
@settings(max_examples=400)
def test_a_mutated_gguf_file_is_a_result_or_an_error(changes: list[tuple[str, int, int]]) -> None:
    content = mutated(GGUF, changes)
    with folder() as place:
        path = write(place / "m.gguf", content)
        found = measured_or_refused(path)
        if isinstance(found, Weights):
            judged = gguf.GGUFReader(path).tensors
            assert found.tensor_bytes == sum(int(one.n_bytes) for one in judged)
            assert found.tensors == len(judged)


@given(st.binary(max_size=300), st.sampled_from(["m.safetensors", "m.gguf", "m"]))
def test_any_bytes_are_a_result_or_an_error(content: bytes, name: str) -> None:
    with folder() as place:
        measured_or_refused(write(place / name, content))
        measured_or_refused(write(place / "in" / name, content).parent)
        measured_or_refused(write(place / "g.gguf", b"GGUF\3\0\0\0" + content))
        measured_or_refused(write(place / "s.safetensors", framed(content)))


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=5),
        st.sampled_from(["m.safetensors", "a.weight", ".."]),
    ),
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "b", "weight_map", "layers", "mediaType", "vae", "quantization", "bits"]),
            below,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@given(json_values, st.sampled_from(["model.safetensors.index.json", "model_index.json", "config.json"]))
def test_any_json_beside_a_model_is_a_result_or_an_error(value: object, name: str) -> None:
    with folder() as place:
        write(place / "m.safetensors", SAFETENSORS)
        write(place / "vae/m.safetensors", SAFETENSORS)
        write(place / name, json.dumps(value))
        measured_or_refused(place)


@given(st.one_of(json_values, edits))
def test_any_manifest_is_a_result_or_an_error(value: object) -> None:
    with folder() as place:
        honest = json.dumps(manifest(layer(place, GGUF), layer(place, SAFETENSORS, "tensor"))).encode()
        is_edit = isinstance(value, list) and value and isinstance(value[0], tuple)
        content = mutated(honest, value) if isinstance(value, list) and is_edit else json.dumps(value).encode()
        path = write(place / "manifests/registry.ollama.ai/library/m/latest", content)
        measured_or_refused(path, place)
        measured_or_refused(Path("m"), place)
