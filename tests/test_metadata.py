"""Settings in picture files: what is written comes back, and no file from elsewhere is too odd."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlxsup import __version__
from mlxsup.metadata import KEY, Settings, exif_block, human_text, png_text, read_settings

FULL = Settings(
    prompt="a red heart",
    negative_prompt="blur",
    seed=7,
    steps=8,
    guidance=1.5,
    strength=0.25,
    width=64,
    height=32,
    model="builtin:emoji",
)
WRITTEN = {
    "prompt": "a red heart",
    "negative_prompt": "blur",
    "seed": 7,
    "steps": 8,
    "guidance": 1.5,
    "strength": 0.25,
    "width": 64,
    "height": 32,
    "model": "builtin:emoji",
    "program": "mlxsup",
    "version": __version__,
}
KINDS = ["PNG", "JPEG", "WEBP"]


def file_of(kind: str, **about: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, kind, **about)
    return file.getvalue()


def with_settings(kind: str, found: Settings) -> bytes:
    return file_of(kind, pnginfo=png_text(found)) if kind == "PNG" else file_of(kind, exif=exif_block(found))


def read(data: bytes) -> dict[str, Any] | None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return read_settings(Path(file.name))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back(kind: str) -> None:
    assert read(with_settings(kind, FULL)) == WRITTEN


def test_a_png_that_lost_its_text_still_has_its_exif() -> None:
    assert read(file_of("PNG", exif=exif_block(FULL))) == WRITTEN


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.sampled_from(KINDS))
def test_a_prompt_may_be_any_text(prompt: str, kind: str) -> None:
    found = read(with_settings(kind, msgspec.structs.replace(FULL, prompt=prompt)))
    assert found is not None
    assert found["prompt"] == prompt


def test_what_had_no_meaning_is_left_out() -> None:
    bare = Settings(prompt="p", seed=1, steps=2, width=3, height=4, model="m")
    assert set(bare.mapping()) == {"prompt", "seed", "steps", "width", "height", "model", "program", "version"}
    assert human_text(bare) == f"p\nSteps: 2, Seed: 1, Size: 3x4, Model: m, Version: mlxsup {__version__}"


def test_the_human_text_is_the_one_that_other_tools_read() -> None:
    with Image.open(io.BytesIO(with_settings("PNG", FULL))) as picture:
        text = picture.info["parameters"]
    assert text.splitlines() == [
        "a red heart",
        "Negative prompt: blur",
        'Steps: 8, CFG scale: 1.5, Seed: 7, Size: 64x32, Model: "builtin:emoji", Denoising strength: 0.25, '
        f"Version: mlxsup {__version__}",
    ]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_carries_the_human_text_as_a_comment(kind: str) -> None:
    with Image.open(io.BytesIO(with_settings(kind, FULL))) as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert picture.getexif()[0x0131] == f"mlxsup {__version__}"
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == human_text(FULL)


@pytest.mark.parametrize("letter", ["x", "\x01", "😀", '"'])
def test_a_prompt_that_no_jpeg_can_hold_is_cut_and_said_to_be(letter: str) -> None:
    found = read(
        with_settings("JPEG", msgspec.structs.replace(FULL, prompt=letter * 70_000, negative_prompt=letter * 70_000))
    )
    assert found is not None
    assert found.pop("cut") is True
    assert 0 < len(found["prompt"]) < 70_000
    assert {**found, "prompt": "a red heart", "negative_prompt": "blur"} == WRITTEN


def test_a_png_holds_any_prompt() -> None:
    found = read(with_settings("PNG", msgspec.structs.replace(FULL, prompt="x" * 1_000_000)))
    assert found is not None
    assert len(found["prompt"]) == 1_000_000


def note_of(text: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = text
    return file_of("JPEG", exif=exif.tobytes())


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "null", '"\\ud800"', "[" * 100_000])
def test_what_others_wrote_under_our_name_is_nothing(text: str) -> None:
    info = PngInfo()
    info.add_itxt(KEY, text)
    assert read(file_of("PNG", pnginfo=info)) is None
    assert read(note_of(b"mlxsup\0" + text.encode()[:50_000])) is None


@pytest.mark.parametrize("data", [*(file_of(kind) for kind in KINDS), note_of(b"Nikon\0"), note_of(b"mlxsup\0\xff")])
def test_a_picture_without_settings_has_none(data: bytes) -> None:
    assert read(data) is None


def test_broken_exif_is_nothing_to_read() -> None:
    for size in range(6, 200, 5):
        assert read(file_of("WEBP", exif=exif_block(FULL)[:size])) is None


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"GIF89a" + b"\0" * 50, b"\x89PNG\r\n\x1a\n", json.dumps(WRITTEN).encode()]
)
def test_what_is_no_picture_is_told_in_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_read_or_refused(kind: str) -> None:
    data = with_settings(kind, FULL)
    for size in range(0, len(data), 7):
        try:
            assert read(data[:size]) in (None, WRITTEN)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - each cut may go either way


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.data())
def test_a_file_with_wrong_bytes_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    found = bytearray(with_settings(kind, FULL))
    for _ in range(data.draw(st.integers(1, 6))):
        found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(found))
    except ValueError as error:
        assert str(error)  # noqa: PT017 - as above


def test_a_picture_of_many_pixels_is_read_without_any_of_them() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    text = KEY.encode() + b"\0\0\0\0\0" + json.dumps(WRITTEN).encode()
    head = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)  # Pillow warns of so many
    assert read(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"iTXt", text) + chunk(b"IDAT", b"")) == WRITTEN
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # and refuses these
    with pytest.raises(ValueError, match="exceeds limit"):
        read(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"iTXt", text) + chunk(b"IDAT", b""))


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_settings(tmp_path)
