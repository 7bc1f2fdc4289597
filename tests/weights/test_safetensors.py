"""Safetensors files and folders, the safetensors library being the judge of what is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlxsup.weights import UnreadableModel, measure

from .complaints import complaint, measured_in_no_time
from .judge import judge
from .making import entry, framed, write
from .making import safetensors as made


def test_sums_are_those_of_the_library(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.zeros((3, 5), np.float32),
        "b": np.zeros((7,), np.float16),
        "scalar": np.zeros((), np.float64),
        "none": np.zeros((0, 4), np.float32),
        "ids": np.zeros((1, 1), np.int64),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})

    found = measure(path)

    everything = (5, sum(one.nbytes for one in arrays.values()))
    assert (found.tensors, found.tensor_bytes) == judge(path.read_bytes()) == everything
    assert found.dtypes == {"F32": 60, "F16": 14, "F64": 8, "I64": 8}
    assert found.format == "safetensors"
    assert [(file.path, file.bytes) for file in found.files] == [(str(path), found.tensor_bytes)]
    assert found.largest is not None
    assert (found.largest.name, found.largest.shape, found.largest.bytes) == ("a", (3, 5), 60)


def test_parameters_are_counted_unless_they_are_packed_into_integers(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.safetensors", made({"w": ("BF16", [64, 64]), "ids": ("I64", [2])}))
    packed = write(tmp_path / "packed.safetensors", made({"w": ("U32", [64, 8]), "w.scales": ("BF16", [64, 1])}))

    assert measure(plain).parameters == 64 * 64
    assert measure(packed).parameters is None
    assert measure(plain).quantisation == "BF16"


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "C64", "BOOL"])
def test_newer_types_have_the_size_the_library_gives_them(tmp_path: Path, dtype: str) -> None:
    for size in (4, 3, 8, 64):
        path = write(
            tmp_path / "x.safetensors", framed(json.dumps({"x": entry(dtype, [8], [0, size])}).encode()) + bytes(size)
        )
        judged = judge(path.read_bytes())
        if judged:
            assert measure(path).tensor_bytes == judged.tensor_bytes == size
        else:
            complaint(path)


def test_a_sparse_file_of_100_gb_is_measured_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse_giant(tmp_path / "giant.safetensors")

    found = measured_in_no_time(path, monkeypatch, at_most=100_000)

    assert found.tensor_bytes == 400 * 250_000_000
    assert found.parameters == found.tensor_bytes // 2


def sparse_giant(path: Path) -> Path:
    """Write 100 GB of which all but the header is a hole."""
    header = {
        f"layers.{i}.w": entry("F16", [125_000_000], [i * 250_000_000, (i + 1) * 250_000_000]) for i in range(400)
    }
    content = framed(json.dumps(header).encode())
    write(path, content)
    with path.open("r+b") as file:
        file.truncate(len(content) + 400 * 250_000_000)
    return path


ONE = json.dumps({"a": entry()}).encode()
OVERLAP = json.dumps({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}).encode()
GAP = json.dumps({"a": entry(offsets=[0, 4]), "b": entry(offsets=[8, 12])}).encode()
DEEP = b"[" * 100_000 + b"]" * 100_000

BAD = {
    "empty": (b"", "cut off"),
    "half a length": (b"\1\0\0", "cut off"),
    "no header": (framed(b"", length=100), "cut off: 8 bytes"),
    "header past the end": (framed(ONE, length=5000) + bytes(4), "needs 5008"),
    "longest length": (framed(ONE, length=2**64 - 1) + bytes(4), "header of 18446744073709551615 bytes"),
    "a header of 200 MB": (framed(ONE, length=200_000_000) + bytes(4), "header of 200000000 bytes"),
    "a header above the limit": (framed(ONE, length=100_000_001) + bytes(4), "header of 100000001 bytes"),
    "an empty header": (framed(b""), "not JSON"),
    "no JSON": (framed(b"hello, this is no JSON"), "not JSON"),
    "a list": (framed(b"[]"), "Expected `object`"),
    "an entry that is a list": (framed(b'{"a":["F32",[1],[0,4]]}') + bytes(4), "tensor 'a'"),
    "truncated": (framed(ONE) + bytes(3), "cut off: its tensors need 4 bytes, 3 are there"),
    "too long": (framed(ONE) + bytes(5), "1 bytes at its end belong to no tensor"),
    "overlapping": (framed(OVERLAP) + bytes(6), "an overlap of tensors 'a' and 'b'"),
    "with a gap": (framed(GAP) + bytes(12), "a gap between tensors 'a' and 'b'"),
    "with a gap at the start": (framed(json.dumps({"a": entry(offsets=[4, 8])}).encode()) + bytes(8), "a gap before"),
    "negative": (framed(json.dumps({"a": entry(offsets=[-4, 0])}).encode()) + bytes(4), "impossible place"),
    "backwards": (framed(json.dumps({"a": entry(offsets=[4, 0])}).encode()) + bytes(4), "impossible place"),
    "a negative side": (framed(json.dumps({"a": entry(shape=[-1, -1])}).encode()) + bytes(4), "impossible shape"),
    "a fraction": (framed(json.dumps({"a": entry(shape=[1.0])}).encode()) + bytes(4), "tensor 'a'"),
    "an endless side": (framed(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}') + bytes(4), ""),
    "5000 digits": (framed(ONE.replace(b"[1]", b"[" + b"9" * 5000 + b"]")) + bytes(4), ""),
    "an overflowing shape": (
        framed(json.dumps({"a": entry(shape=[2**62, 2**62])}).encode()) + bytes(4),
        "impossible shape",
    ),
    "an overflow that 0 would hide": (
        framed(json.dumps({"a": entry("F32", [2**62, 4, 0], [0, 0])}).encode()),
        "impossible shape",
    ),
    "endless shapes": (
        framed(json.dumps({"a": entry(shape=[10**17] * 10_000)}).encode()) + bytes(4),
        "impossible shape",
    ),
    "a shape of another size": (framed(json.dumps({"a": entry(shape=[2])}).encode()) + bytes(4), "its shape needs 8"),
    "an unknown type": (framed(json.dumps({"a": entry("F31")}).encode()) + bytes(4), "unknown type 'F31'"),
    "half a byte": (framed(json.dumps({"a": entry("F4", [3], [0, 2])}).encode()) + bytes(2), "its shape needs 1.5"),
    "three offsets": (framed(json.dumps({"a": entry(offsets=[0, 4, 8])}).encode()) + bytes(4), "tensor 'a'"),
    "a key twice": (framed(ONE[:-1] + b"," + ONE[1:]) + bytes(4), "the key 'a' is there twice"),
    "a field twice": (
        framed(ONE.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"')) + bytes(4),
        "'dtype' is there twice",
    ),
    "a field twice, once in disguise": (
        framed(ONE.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtyp\\u0065": "F32"')) + bytes(4),
        "'dtype' is there twice",
    ),
    "not UTF-8": (framed(ONE.replace(b'"a"', b'"\xff"')) + bytes(4), "not UTF-8"),
    "UTF-16": (framed(ONE.decode().encode("utf-16")) + bytes(4), ""),
    "half a surrogate": (framed(ONE.replace(b'"a"', b'"\\ud800"')) + bytes(4), "not JSON"),
    "metadata that is no text": (framed(b'{"__metadata__":{"a":1}}'), "Expected `str`"),
    "nested lists": (framed(DEEP), ""),
    "nested objects": (framed(b'{"a":' * 100_000), "nested too deeply"),
    "nesting in a tensor": (framed(b'{"a":' + DEEP + b"}"), "nested too deeply"),
    "nesting beside a tensor's fields": (
        framed(ONE.replace(b'"dtype"', b'"x": ' + DEEP + b', "dtype"')) + bytes(4),
        "nested too deeply",
    ),
    "nesting in the metadata": (framed(b'{"__metadata__":{"a":' + DEEP + b"}}"), "nested too deeply"),
    "two million tensors": (framed(b"{" + b'"":0,' * 2_000_000 + b'"":0}'), "too many items"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_file_is_an_error_that_says_why(tmp_path: Path, case: str) -> None:
    content, why = BAD[case]

    assert why in complaint(write(tmp_path / "bad.safetensors", content))


def test_a_header_of_200_mb_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", framed(b"{", length=200_000_000))
    with path.open("r+b") as file:
        file.truncate(300_000_000)

    assert "header of 200000000 bytes" in complaint(path)


def test_what_the_library_reads_is_read(tmp_path: Path) -> None:
    odd = [
        framed(b"{}"),
        framed(b'{"__metadata__":null}'),
        framed(b' {"a": {"shape": [], "data_offsets": [0, 4], "dtype": "F32", "more": {"x": [1]}}}  \n') + bytes(4),
        framed(json.dumps({'"dtype"': entry(), "__metadata__": {"data_offsets": '{"shape": 1}'}}).encode()) + bytes(4),
        framed(json.dumps({"z": entry("F32", [0], [4, 4]), "é\u2028": entry()}, ensure_ascii=False).encode())
        + bytes(4),
    ]
    for content in odd:
        found = measure(write(tmp_path / "odd.safetensors", content))
        assert (found.tensors, found.tensor_bytes) == judge(content)


# Folders


def sharded(folder: Path, shards: int = 3) -> Path:
    """Write a model in shards with an index, as transformers does."""
    placed: dict[str, str] = {}
    for one in range(1, shards + 1):
        name = f"model-{one:05}-of-{shards:05}.safetensors"
        tensors = {f"layers.{one}.{part}": ("BF16", [8, one]) for part in "ab"}
        write(folder / name, made(tensors))
        placed |= dict.fromkeys(tensors, name)
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": placed})
    return folder


def test_shards_are_those_the_index_names(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "consolidated.safetensors", made({"everything": ("F32", [1000])}))
    write(tmp_path / "._model-00001-of-00003.safetensors", b"what macOS leaves on foreign disks")

    found = measure(tmp_path)

    assert [(Path(file.path).name[:11], file.bytes) for file in found.files] == [
        ("model-00001", 32),
        ("model-00002", 64),
        ("model-00003", 96),
    ]
    assert (found.tensor_bytes, found.tensors, found.path) == (192, 6, str(tmp_path))


def test_config_tells_context_and_quantisation(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "config.json", '{"text_config": {"max_position_embeddings": 40960}, "x": [0.0, Infinity],'
          ' "quantization": {"group_size": 64, "bits": 4}}')  # fmt: skip
    found = measure(tmp_path)
    assert (found.context_length, found.quantisation) == (40960, "4-bit")

    write(tmp_path / "config.json", {"max_position_embeddings": "many", "quantization_config": {"quant_method": "fp8"}})
    found = measure(tmp_path)
    assert (found.context_length, found.quantisation) == (None, "fp8")


@pytest.mark.parametrize("config", ["[]", "{", "\udcff", '{"a":' * 100_000])
def test_a_config_that_is_no_json_object_is_an_error(tmp_path: Path, config: str) -> None:
    write(sharded(tmp_path) / "config.json", config.encode(errors="surrogateescape"))

    complaint(tmp_path, about=tmp_path / "config.json")


def test_a_shard_that_is_missing_is_an_error_that_names_it(tmp_path: Path) -> None:
    gone = sharded(tmp_path) / "model-00002-of-00003.safetensors"
    gone.unlink()

    assert "model.safetensors.index.json names it" in complaint(tmp_path, about=gone)

    (tmp_path / "model.safetensors.index.json").unlink()
    assert "of the same set" in complaint(tmp_path, about=gone)


def test_a_shard_without_a_tensor_the_index_says_it_holds_counts_as_it_is(tmp_path: Path) -> None:
    """Loaders take what a file holds: indexes go on naming `lm_head.weight` where it is tied to the embeddings."""
    write(sharded(tmp_path) / "model-00002-of-00003.safetensors", made({"layers.2.a": ("BF16", [8, 2])}))

    assert (measure(tmp_path).tensors, measure(tmp_path).tensor_bytes) == (5, 192 - 32)


@pytest.mark.parametrize("names", [["model"], ["model-00001-of-00002", "model-00002-of-00002"]])
def test_an_index_that_names_nothing_that_is_there_is_that_of_another_model(tmp_path: Path, names: list[str]) -> None:
    """Quantised models often come with the index of the one they were made of."""
    sharded(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    for name in names:
        write(tmp_path / f"{name}.safetensors", made({"w": ("U32", [4])}))
    write(tmp_path / "consolidated.safetensors", made({"everything": ("F32", [1000])}))

    assert [Path(file.path).stem for file in measure(tmp_path).files] == names


def test_half_of_a_model_is_an_error_whatever_its_index_names(tmp_path: Path) -> None:
    sharded(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    gone = tmp_path / "model-00001-of-00003.safetensors"
    write(tmp_path / "adapters.safetensors", made({"lora": ("F32", [4])}))
    assert "model.safetensors.index.json names it" in complaint(tmp_path, about=gone)

    write(tmp_path / "model-00002-of-00002.safetensors", made({"w": ("U32", [4])}))
    assert "of the same set" in complaint(tmp_path, about=tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "not JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 1}}', "Expected `str`"),
        ('{"weight_map": {"a": "x", "a": "x"}}', "twice"),
        ('{"weight_map": {"a": "../x"}}', "not below its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not below its folder"),
        ('{"weight_map": {"a": ""}}', "not below its folder"),
        ('{"weight_map": {"a": "x\\u0000"}}', "not below its folder"),
        ('{"weight_map": {"a": "x"}, "b": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_cannot_be_followed_is_an_error(tmp_path: Path, index: str, why: str) -> None:
    path = write(sharded(tmp_path) / "model.safetensors.index.json", index)

    assert why in complaint(tmp_path, about=path)


def test_of_two_indexes_the_plain_one_counts(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "model.safetensors.index.fp16.json", "{")
    assert measure(tmp_path).tensors == 6

    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "other.safetensors.index.json")
    assert "more than one index" in complaint(tmp_path)


def test_without_an_index_all_files_count_but_doubles(tmp_path: Path) -> None:
    one = made({"w": ("F16", [4])})
    for name in ("weights.00", "weights.01"):
        write(tmp_path / "plain" / f"{name}.safetensors", one)
    for name in ("model", "model.fp16", "consolidated", "model-vision"):
        write(tmp_path / "doubles" / f"{name}.safetensors", one)

    assert measure(tmp_path / "plain").tensor_bytes == 16
    assert [Path(file.path).stem for file in measure(tmp_path / "doubles").files] == ["model-vision", "model"]


def test_ten_thousand_files_are_no_model(tmp_path: Path) -> None:
    for number in range(10_001):
        (tmp_path / f"{number}.safetensors").touch()

    with pytest.raises(UnreadableModel, match="more than 10000 files"):
        measure(tmp_path)
