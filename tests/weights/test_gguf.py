"""GGUF files, the gguf package being the judge; it writes them and reads them."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxsup.weights import measure
from mlxsup.weights.ggml import FILE_TYPES, TYPES

from .complaints import complaint, measured_in_no_time
from .making import ARRAY, F16, F32, I32, Q4_K, STRING, U16, U32, key, number, split_keys, tensor, text, u32, u64, write
from .making import gguf as made


def written(path: Path, *, split_max_tensors: int = 0, alignment: int = 0, tensors: int = 7) -> Path:
    """Let the package write a model; return the file, or the first of its parts."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_context_length(131_072)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_token_list([f"token {number}" for number in range(1000)])
    writer.add_token_scores([0.5] * 1000)
    writer.add_token_merges(["a b", "b c"])
    writer.add_array("nested.numbers", [1, 2, 3])
    writer.add_bool("flag", val=True)
    writer.add_float64("pi", 3.14)
    for one in range(tensors):
        writer.add_tensor(f"blk.{one}.weight", np.ones((one + 1, 256), np.float32 if one % 2 else np.float16))
    packed = gguf.quants.quantize(np.ones((4, 256), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob("*.gguf"))


@pytest.mark.parametrize("alignment", [0, 64, 4096])
def test_sums_are_those_of_the_package(tmp_path: Path, alignment: int) -> None:
    path = written(tmp_path / "model.gguf", alignment=alignment)
    judged = gguf.GGUFReader(path).tensors

    found = measure(path)

    assert found.tensor_bytes == sum(int(one.n_bytes) for one in judged)
    assert found.parameters == sum(int(one.n_elements) for one in judged)
    assert found.tensors == len(judged) == 8
    assert found.dtypes == {
        "F32": 2 * 4 * 256 + 4 * 4 * 256 + 6 * 4 * 256,
        "F16": (1 + 3 + 5 + 7) * 2 * 256,
        "Q8_0": 4 * 8 * 34,
    }
    assert (found.format, found.quantisation, found.context_length) == ("gguf", "Q4_K_M", 131_072)
    assert found.largest is not None
    assert (found.largest.name, found.largest.shape) == ("blk.5.weight", (256, 6))


def test_split_files_are_measured_together_whichever_is_named(tmp_path: Path) -> None:
    first = written(tmp_path / "big.gguf", split_max_tensors=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"big-0000{one}-of-00003.gguf" for one in (1, 2, 3)]
    judged = sum(int(one.n_bytes) for part in parts for one in gguf.GGUFReader(part).tensors)

    for part in (*parts, tmp_path):
        found = measure(part)
        assert (found.tensor_bytes, found.tensors) == (judged, 8)
        assert [file.path for file in found.files] == list(map(str, parts))
        assert (found.quantisation, found.context_length) == ("Q4_K_M", 131_072)

    parts[1].unlink()
    assert "of the same set" in complaint(first, about=parts[1])


def test_parts_that_do_not_belong_together_are_an_error(tmp_path: Path) -> None:
    def part(one: int, count: int = 2, tensors: int = 2) -> bytes:
        return made(split_keys(one, count, tensors), [tensor(f"t{one}", [8])], 32)

    first = write(tmp_path / "m-00001-of-00002.gguf", part(0))
    second = write(tmp_path / "m-00002-of-00002.gguf", part(1))
    assert measure(first).tensor_bytes == 64

    write(second, part(0))
    assert "by its header part 1 of 2, by its name 2 of 2" in complaint(first, about=second)
    write(second, part(1, count=3))
    assert "by its header part 2 of 3" in complaint(first, about=second)
    write(first, part(0, tensors=3))
    write(second, part(1))
    assert "holds 2 tensors where its header says 3" in complaint(first)
    lonely = write(tmp_path / "renamed.gguf", part(0))
    assert "its name does not end in -NNNNN-of-00002.gguf" in complaint(lonely)
    many = write(tmp_path / "m-00001-of-65535.gguf", part(0, count=65_535))
    assert "one of 65535 files" in complaint(many)


def test_version_2_is_read_as_version_3_is(tmp_path: Path) -> None:
    content = made([number("general.alignment", 64)], [tensor("a", [256, 2], Q4_K)], 288, version=2, alignment=64)

    assert measure(write(tmp_path / "old.gguf", content)).tensor_bytes == 288


def test_the_types_are_those_of_the_package() -> None:
    judged = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: tuple(one) for kind, one in TYPES.items() if kind in judged} == judged
    named = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    assert {**FILE_TYPES, int(gguf.LlamaFileType.GUESSED): "GUESSED"} == named


def test_a_sparse_file_of_100_gb_is_measured_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse_giant(tmp_path / "giant.gguf")

    found = measured_in_no_time(path, monkeypatch, at_most=3_000_000)

    assert (found.tensor_bytes, found.tensors, found.quantisation) == (400 * 250_000_000, 400, "F16")


def sparse_giant(path: Path) -> Path:
    """Write 100 GB of which all but the header, with a vocabulary of 128,000 tokens, is a hole."""
    step = 250_000_000 // 32 * 32
    keys = [
        key("general.architecture", STRING, text("llama")),
        number("general.file_type", 1),
        key(
            "tokenizer.ggml.tokens",
            ARRAY,
            u32(STRING) + u64(128_000) + b"".join(text(f"token{one}") for one in range(128_000)),
        ),
    ]
    tensors = [tensor(f"blk.{one}", [125_000_000], F16, one * step) for one in range(400)]
    content = made(keys, tensors)
    write(path, content)
    with path.open("r+b") as file:
        file.truncate(len(content) + 400 * step)
    return path


BIG = 2**63
NESTED = u32(ARRAY) + u64(1)
BAD = {
    "empty": (b"", "cut off"),
    "magic alone": (b"GGUF", "cut off"),
    "another magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "version 1": (made(version=1), "GGUF version 1; versions 2 and 3 are read"),
    "version 4": (made(version=4), "GGUF version 4"),
    "big-endian": (made(version=3 << 24), "big-endian"),
    "2^60 tensors": (made(counts=(2**60, 0)) + bytes(1000), "claims 1152921504606846976 tensors"),
    "2^60 keys": (made(counts=(0, 2**60)) + bytes(1000), "claims 1152921504606846976 keys"),
    "fewer tensors than claimed": (made(counts=(1, 0)), "cut off"),
    "fewer keys than claimed": (made(counts=(0, 9)), "cut off"),
    "a key of 2^63 bytes": (made([u64(BIG)]) + bytes(1000), "the name of a key has 9223372036854775808 bytes"),
    "a key past the end": (made([u64(60_000)]) + bytes(1000), "goes on past the end"),
    "a key twice": (made([number("a", 1), number("a", 1)]), "the key 'a' is there twice"),
    "a key not UTF-8": (made([text(b"\xff") + u32(U32) + u32(1)]), "not UTF-8"),
    "an unknown type of value": (made([key("a", 13, u64(0))]), "unknown type 13"),
    "a string of 2^63 bytes": (made([key("a", STRING, u64(BIG))]) + bytes(1000), "goes on past the end"),
    "a string of 2^64 - 1 bytes": (made([key("a", STRING, u64(2**64 - 1))]) + bytes(1000), "goes on past the end"),
    "2^60 numbers": (made([key("a", ARRAY, u32(U32) + u64(2**60))]) + bytes(1000), "goes on past the end"),
    "2^60 strings": (made([key("a", ARRAY, u32(STRING) + u64(2**60))]) + bytes(1000), "more than 4000000 strings"),
    "strings past the end": (made([key("a", ARRAY, u32(STRING) + u64(1000))]) + bytes(1000), "goes on past the end"),
    "a string in an array of 2^64 - 1 bytes": (
        made([key("a", ARRAY, u32(STRING) + u64(2) + u64(2**64 - 1))]) + bytes(99),
        "past the end",
    ),
    "2^60 arrays": (made([key("a", ARRAY, u32(ARRAY) + u64(2**60))]) + bytes(1000), "arrays"),
    "arrays in arrays in arrays": (made([key("a", ARRAY, NESTED * 100_000)]), "nested too deeply"),
    "wide and deep": (made([key("a", ARRAY, (u32(ARRAY) + u64(90_000)) * 3)]) + bytes(1000), ""),
    "alignment 0": (made([number("general.alignment", 0)]), "alignment of 0"),
    "alignment 24": (made([number("general.alignment", 24)]), "alignment of 24"),
    "alignment that is no number": (made([key("general.alignment", STRING, text("32"))]), "no natural number"),
    "a negative part": (made([number("split.no", -1, I32)]), "'split.no' is no natural number"),
    "a context that is no number": (
        made([key("general.architecture", STRING, text("x")), key("x.context_length", STRING, text("y"))]),
        "'x.context_length' is no natural number",
    ),
    "a tensor twice": (made([], [tensor("a", [8]), tensor("a", [8], offset=32)], 64), "tensor 'a' is there twice"),
    "a name not UTF-8": (made([], [text(b"\xff") + u32(0) + u32(0) + u64(0)], 64), "not UTF-8"),
    "2^31 dimensions": (made([], [text("a") + u32(2**31) + bytes(100)]), "2147483648 dimensions"),
    "an overflowing shape": (made([], [tensor("a", [BIG, 4, 4, 4])]), "impossible shape"),
    "an overflow in bytes": (made([], [tensor("a", [2**62])]), "cut off"),
    "an unknown type": (made([], [tensor("a", [8], 99)], 32), "type 99, which is not known"),
    "a type of earlier days": (made([], [tensor("a", [8], 4)], 32), "type 4, which llama.cpp reads no longer"),
    "half a block": (made([], [tensor("a", [100], Q4_K)], 144), "blocks of 256"),
    "a scalar of blocks": (made([], [tensor("a", [], Q4_K)], 144), "blocks of 256"),
    "not aligned": (made([], [tensor("a", [8], F32, 4)], 64), "not aligned to 32 bytes"),
    "overlapping": (made([], [tensor("a", [16]), tensor("b", [8], F32, 32)], 96), "an overlap of tensors 'a' and 'b'"),
    "at the same place": (made([], [tensor("a", [8]), tensor("b", [8])], 64), "an overlap"),
    "an offset past the end": (made([], [tensor("a", [8], F32, BIG)], 64), "cut off"),
    "truncated": (made([], [tensor("a", [8])], 31), "its tensors need 32 bytes, 31 are there"),
    "no tensors at all": (made([], [tensor("a", [8])])[:-1], "cut off"),
    "one of three, as itself": (made([number("split.count", 3, U16)]), "one of 3 files of a split model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_file_is_an_error_that_says_why(tmp_path: Path, case: str) -> None:
    content, why = BAD[case]

    assert why in complaint(write(tmp_path / "bad.gguf", content))


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", made([key("a", STRING, u64(150_000_000))], [tensor("a", [8])]))
    with path.open("r+b") as file:
        file.truncate(100 * 10**9)

    assert "a header of more than 100000000 bytes" in complaint(path)


def test_arrays_in_arrays_are_stepped_over(tmp_path: Path) -> None:
    strings = u32(STRING) + u64(2) + text("one") + text("two")
    numbers = u32(U16) + u64(3) + bytes(6)
    long = key("long", STRING, u64(300_000) + bytes(300_000))
    content = made(
        [key("a", ARRAY, u32(ARRAY) + u64(2) + strings + numbers), long, number("b", 1)], [tensor("a", [8])], 32
    )

    assert measure(write(tmp_path / "odd.gguf", content)).tensor_bytes == 32


def test_a_folder_must_hold_one_model_with_or_without_its_projector(tmp_path: Path) -> None:
    model = made([], [tensor("a", [8])], 32)
    for name in ("one", "mmproj-one"):
        write(tmp_path / f"{name}.gguf", model)
    assert measure(tmp_path).tensor_bytes == 64

    write(tmp_path / "two.gguf", model)
    assert "not one GGUF model; name the file: one.gguf, two.gguf" in complaint(tmp_path)


@pytest.mark.parametrize("name", ["one-mmproj-f16", "One.MMPROJ"])
def test_a_projector_is_known_wherever_its_name_says_so(tmp_path: Path, name: str) -> None:
    for each in ("one", name):
        write(tmp_path / f"{each}.gguf", made([], [tensor("a", [8])], 32))

    found = measure(tmp_path)

    assert {Path(file.path).stem for file in found.files} == {"one", name}


@pytest.mark.parametrize("what", ["keys", "values", "context lengths"])
def test_a_header_of_large_keys_is_not_kept(tmp_path: Path, what: str) -> None:
    large = "\N{GRINNING FACE}" + 32_000 * "é"  # in memory, each of its characters takes four bytes
    keys = {
        "keys": [key(f"{large}{one}", U32, u32(1)) for one in range(200)],
        "values": [key(f"{one}", STRING, text(large)) for one in range(200)],
        "context lengths": [key(f"{one}{large}.context_length", STRING, text(large)) for one in range(100)],
    }[what]
    path = write(tmp_path / "large.gguf", made([*keys, number("general.file_type", 15)], [tensor("a", [8])], 32))
    measure(path)

    tracemalloc.start()
    try:
        assert measure(path).quantisation == "Q4_K_M"
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert path.stat().st_size > 12_000_000
    assert most < 3_000_000


def test_the_architecture_may_be_told_after_its_context_length(tmp_path: Path) -> None:
    keys = [number("y.context_length", 1), number("x.context_length", 4096)]
    keys.append(key("general.architecture", STRING, text("x")))

    assert measure(write(tmp_path / "x.gguf", made(keys, [tensor("a", [8])], 32))).context_length == 4096
