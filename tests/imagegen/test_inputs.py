"""Pictures that come along: every kind that is taken looks as a viewer shows it, and all else is refused by its name."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageOps

from mlxsup.errors import InvalidRequest
from mlxsup.imagegen.inputs import MOST_PIXELS, fitted, read_picture

KINDS = ["PNG", "JPEG", "WEBP"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def sample(width: int = 48, height: int = 32) -> Image.Image:
    """A picture whose four corners differ."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width // 2, height // 2), fill="red")
    draw.rectangle((width // 2, height // 2, width, height), fill="blue")
    draw.rectangle((0, height // 2, width // 2, height), fill="black")
    return picture


def saved(picture: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def read(data: bytes, longest: int = 4096) -> Image.Image:
    return read_picture(data, "images[0]", longest)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequest, match=r"^images\[3\] [^\n]+$") as caught:
        read_picture(data, "images[3]", 256)
    assert caught.value.details["param"] == "images[3]"
    return caught.value.message


def alike(one: Image.Image, other: Image.Image, most: int = 0) -> bool:
    """Whether no level of a pixel differs by more than `most`."""
    if one.size != other.size:
        return False
    differing = ImageChops.difference(one, other).tobytes()
    return max(differing) <= most


class TestTaken:
    @pytest.mark.parametrize(
        ("kind", "how"),
        [
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("WEBP", {"quality": 95}),
            ("JPEG", {"quality": 98}),
            ("JPEG", {"quality": 40, "progressive": True}),
        ],
    )
    def test_each_kind_of_file(self, kind: str, how: dict[str, Any]) -> None:
        data = saved(sample(), kind, **how)
        with Image.open(io.BytesIO(data)) as picture:
            assert alike(read(data), picture.convert("RGB"))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
    def test_each_kind_of_pixel(self, mode: str) -> None:
        grey = sample().convert("L").point(lambda value: 255 if value > 100 else 0)
        if mode == "I;16":
            picture = Image.frombytes(
                mode, grey.size, b"".join(struct.pack("<H", value * 257) for value in grey.tobytes())
            )
        else:
            picture = grey.convert(mode)
        found = read(saved(picture, "PNG"))
        assert found.mode == "RGB"
        assert alike(found, grey.convert("RGB"))

    def test_grey_of_16_bits_keeps_its_shades(self) -> None:
        picture = Image.frombytes("I;16", (4, 1), struct.pack("<4H", 0, 0x4000, 0x8000, 0xFFFF))
        assert [pixel[0] for pixel in pixels(read(saved(picture, "PNG")))] == [0, 0x40, 0x80, 0xFF]

    def test_cmyk(self) -> None:
        found = read(saved(sample().convert("CMYK"), "JPEG", quality=98))
        assert alike(found, sample(), 30)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_what_is_clear_is_white(self, kind: str) -> None:
        picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        picture.paste((255, 0, 0, 255), (4, 0, 8, 8))
        how = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        found = read(saved(picture, kind, **how))
        assert (found.getpixel((0, 0)), found.getpixel((7, 7))) == (WHITE, RED)

    def test_what_is_half_clear_is_half_white(self) -> None:
        found = read(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG"))
        assert found.getpixel((0, 0)) == (255, 127, 127)

    @pytest.mark.parametrize(
        ("picture", "clear"),
        [
            (Image.new("RGB", (2, 1), RED), RED),
            (Image.new("L", (2, 1), 9), 9),
            (Image.new("P", (2, 1), 0), 0),
            (Image.frombytes("I;16", (2, 1), struct.pack("<2H", 300, 300)), 300),
        ],
        ids=["RGB", "L", "P", "I;16"],
    )
    def test_a_colour_that_stands_for_clear_is_white(self, picture: Image.Image, clear: Any) -> None:
        other = picture.copy()
        assert read(saved(picture, "PNG")).getpixel((0, 0)) != WHITE
        assert read(saved(other, "PNG", transparency=clear)).getpixel((0, 0)) == WHITE

    @pytest.mark.parametrize("orientation", range(9))
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_turned_upright(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(sample(), kind, exif=exif.tobytes())
        with Image.open(io.BytesIO(data)) as picture:
            expected = ImageOps.exif_transpose(picture).convert("RGB")
        assert alike(read(data), expected)

    def test_broken_exif_leaves_it_as_it_is(self) -> None:
        assert alike(read(saved(sample(), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")), sample())

    @pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
    @pytest.mark.parametrize("size", [2 << 20, 12 << 20])
    def test_much_packed_text_or_profile_is_no_reason_to_refuse_it(self, kind: bytes, size: int) -> None:
        start = b"workflow\0\1\0\0\0" if kind == b"iTXt" else b"workflow\0\0"
        plain = saved(sample(), "PNG")
        data = plain[:33] + chunk(kind, start + zlib.compress(b"a" * size)) + plain[33:]
        assert alike(read(data), sample())

    def test_a_photograph_with_a_second_picture_in_its_file(self) -> None:
        """As telephones make them: the second one is of depth, or small."""
        data = saved(
            sample(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=98, subsampling=0
        )
        assert alike(read(data), sample(), 12)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [(1000, 600), (600, 1000), (1000, 3), (3, 1000), (1, 1)])
    def test_it_is_no_larger_than_needed_and_keeps_its_shape(self, kind: str, size: tuple[int, int]) -> None:
        found = read(saved(sample(*size), kind), longest=100)
        assert max(found.size) == min(100, max(size))
        assert abs(min(found.size) - min(size) * max(found.size) / max(size)) < 1.01

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [(1003, 601), (97, 1501)])
    def test_it_looks_the_same_when_it_is_shrunk(self, kind: str, size: tuple[int, int]) -> None:
        """Strips and steps of the way leave no seam."""
        with Image.open(io.BytesIO(saved(sample(*size), kind, quality=98))) as whole:
            found = read(saved(sample(*size), kind, quality=98), longest=64)
            expected = whole.convert("RGB").resize(found.size, Image.Resampling.BOX)
        differing = ImageChops.difference(found, expected).convert("L").point(lambda value: 255 if value > 40 else 0)
        assert differing.histogram()[255] < 0.08 * found.width * found.height

    def test_a_large_one_is_read(self) -> None:
        found = read(saved(Image.new("L", (7000, 7000), 7), "PNG"), longest=64)
        assert pixels(found) == [(7, 7, 7)] * 64 * 64


class TestRefused:
    @pytest.mark.parametrize("data", [b"", b"hello", saved(sample(), "GIF"), saved(sample(), "BMP"), b"<svg/>"])
    def test_other_files(self, data: bytes) -> None:
        assert refusal(data) == "images[3] is no JPEG, PNG or WebP picture"

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_animations(self, kind: str) -> None:
        data = saved(sample(), kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")], duration=100)
        assert refusal(data) == "images[3] is animated (2 frames); send one picture"

    @pytest.mark.parametrize("kind", KINDS)
    def test_cut_off_files(self, kind: str) -> None:
        data = saved(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
        for share in (0.3, 0.6, 0.9):
            assert "is broken or cut off: " in refusal(data[: int(share * len(data))])

    @pytest.mark.parametrize("kind", KINDS)
    def test_any_cut_ends_in_a_picture_or_a_refusal(self, kind: str) -> None:
        data = saved(sample(), kind)
        for size in range(len(data)):
            settle(data[:size])

    @settings(max_examples=200)
    @given(st.sampled_from(KINDS), st.data())
    def test_wrong_bytes_end_in_a_picture_or_a_refusal(self, kind: str, data: st.DataObject) -> None:
        found = bytearray(FILES[kind])
        for _ in range(data.draw(st.integers(1, 5))):
            found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
        settle(bytes(found))

    @pytest.mark.parametrize("size", [(10_000, 5_001), (16_000, 8_000), (16_383, 16_383)])
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP VP8", "WEBP VP8L", "WEBP VP8X"])
    def test_too_many_pixels_are_refused_by_the_header(self, kind: str, size: tuple[int, int]) -> None:
        """There is nothing behind these headers that could be decoded."""
        tracemalloc.start()
        try:
            told = refusal(HEADERS[kind](*size))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert told.startswith("images[3] has more than 50 megapixels")
        assert told.endswith("; send a smaller one")
        assert peak < 5 << 20

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP VP8", "WEBP VP8L", "WEBP VP8X"])
    def test_as_many_as_are_taken_are_not(self, kind: str) -> None:
        told = refusal(HEADERS[kind](10_000, MOST_PIXELS // 10_000))
        assert "megapixels" not in told

    @pytest.mark.parametrize("size", [200 << 20, 17 << 20])
    def test_text_that_unpacks_to_no_end(self, size: int) -> None:
        plain = saved(sample(), "PNG")
        data = plain[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(size))) + plain[33:]
        assert "is broken or cut off: " in refusal(data)

    def test_a_canvas_of_four_thousand_million_pixels(self) -> None:
        assert "4294836225" not in refusal(webp_x(65_535, 65_535))


class TestFitted:
    def test_the_whole_of_it_stands_in_the_middle_of_white(self) -> None:
        found = fitted(Image.new("RGB", (10, 5), RED), 40, 40)
        assert found.size == (40, 40)
        assert found.getpixel((20, 9)) == WHITE
        assert found.crop((0, 10, 40, 30)).getcolors() == [(800, RED)]

    @pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (64, 64), (100, 7)])
    @given(st.integers(1, 200), st.integers(1, 200))
    @settings(max_examples=20)
    def test_any_shape_into_any_other(self, size: tuple[int, int], width: int, height: int) -> None:
        assert fitted(Image.new("RGB", size), width, height).size == (width, height)

    def test_what_fits_is_not_touched(self) -> None:
        assert alike(fitted(sample(), 48, 32), sample())


def pixels(picture: Image.Image) -> list[tuple[int, ...]]:
    data = picture.tobytes()
    return [tuple(data[at : at + 3]) for at in range(0, len(data), 3)]


def settle(data: bytes) -> None:
    try:
        found = read_picture(data, "images[0]", 256)
    except InvalidRequest as error:
        assert error.message.startswith("images[0] ")  # noqa: PT017 - each may go either way
    else:
        assert found.mode == "RGB"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT5\xaf\x06\x1e"


def jpeg(width: int, height: int) -> bytes:
    frame = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", height, width) + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0"


def webp(chunk: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def webp_lossy(width: int, height: int) -> bytes:
    body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(40)
    return webp(b"VP8 " + struct.pack("<I", len(body)) + body)


def webp_lossless(width: int, height: int) -> bytes:
    body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(41)
    return webp(b"VP8L" + struct.pack("<I", len(body)) + body)


def webp_x(width: int, height: int) -> bytes:
    body = b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = b"ANIM\x06\0\0\0" + bytes(6) + b"ANMF\x10\0\0\0" + bytes(16)
    return webp(b"VP8X" + struct.pack("<I", len(body)) + body + frame)


HEADERS: dict[str, Callable[[int, int], bytes]] = {
    "PNG": png,
    "JPEG": jpeg,
    "WEBP VP8": webp_lossy,
    "WEBP VP8L": webp_lossless,
    "WEBP VP8X": webp_x,
}
FILES = {kind: saved(sample(), kind) for kind in KINDS}
