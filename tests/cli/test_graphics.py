"""What a terminal reads for a picture, read back: the same file, or the same pixels."""

from __future__ import annotations

import random
import re

import pytest

from mlxsup.cli.terminal.graphics import IndexedPixels, Pixels, half_blocks, kitty, sixel
from tests.cli.terminals import Screen


@pytest.mark.parametrize("size", [1, 3071, 3072, 3073, 6144, 10_000])
def test_kitty_gets_the_file_in_chunks_and_one_set_of_keys(size: int) -> None:
    file = random.Random(size).randbytes(size)
    screen = Screen()
    screen.feed(kitty(file, number=7, columns=30, rows=12))
    ((keys, found, _),) = screen.kitty_pictures()
    assert found == file
    assert {name: keys[name] for name in "afticr"} == {"a": "T", "f": "100", "t": "d", "i": "7", "c": "30", "r": "12"}
    assert keys["C"] == "1"
    assert len(screen.drawings) == max(1, -(-size // 3072))
    assert all(drawing.body.startswith("Gq=2,m=") for drawing in screen.drawings[1:])


def _decode_sixel(written: str) -> tuple[int, int, list[tuple[int, int, int] | None]]:
    """Read a picture as a terminal does: parts of a colour from 0 to 100, None where nothing was drawn."""
    found = re.fullmatch(r'\x1bP0;1;0q"1;1;(\d+);(\d+)(.*)\x1b\\', written)
    assert found is not None
    width, height = int(found[1]), int(found[2])
    palette: dict[int, tuple[int, int, int]] = {}
    pixels: list[tuple[int, int, int] | None] = [None] * (width * height)
    column = top = colour = 0
    rest = found[3]
    token = re.compile(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|(\$)|(-)")
    at = 0
    while at < len(rest):
        match = token.match(rest, at)
        assert match is not None, rest[at : at + 20]
        at = match.end()
        if match[1]:
            palette[int(match[1])] = int(match[2]), int(match[3]), int(match[4])
        elif match[5]:
            colour = int(match[5])
        elif match[9]:
            column = 0
        elif match[10]:
            column, top = 0, top + 6
        else:
            bits = ord(match[7] or match[8]) - 63
            count = int(match[6] or 1)
            assert column + count <= width
            for place in (place for place in range(6) if bits >> place & 1):
                start = (top + place) * width + column
                assert pixels[start : start + count] == [None] * count, "drawn twice"
                pixels[start : start + count] = [palette[colour]] * count
            column += count
    assert top < height, "a band below the picture would scroll"
    return width, height, pixels


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 6), (20, 13), (64, 5), (33, 12)])
@pytest.mark.parametrize("colours", [1, 2, 256])
def test_sixel_has_every_pixel_in_its_colour(width: int, height: int, colours: int) -> None:
    chance = random.Random(width * height)
    palette = [(chance.randrange(256), chance.randrange(256), chance.randrange(256)) for _ in range(colours)]
    rows = [bytes([chance.randrange(colours)]) * width for _ in range(height // 2)]  # even rows, as in drawings
    rows += [bytes(chance.randrange(colours) for _ in range(width)) for _ in range(height - len(rows))]
    chance.shuffle(rows)
    picture = IndexedPixels(width, height, b"".join(rows), palette)
    found_width, found_height, pixels = _decode_sixel(sixel(picture))
    assert (found_width, found_height) == (width, height)
    for index, pixel in zip(picture.indices, pixels, strict=True):
        assert pixel is not None
        for part, told in zip(palette[index], pixel, strict=True):
            assert abs(part - told * 255 / 100) <= 1.3  # a hundredth, to and fro


def test_sixel_of_even_areas_is_short() -> None:
    assert len(sixel(IndexedPixels(600, 600, bytes(360_000), [(1, 2, 3)]))) < 1000


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (8, 7), (40, 40)])
def test_half_blocks_have_two_pixels_a_cell(width: int, height: int) -> None:
    chance = random.Random(width + height)
    rgb = chance.randbytes(3 * width * height)
    screen = Screen(rows=height + 1)
    screen.feed("\n" * height + f"\x1b[{height}A" + half_blocks(Pixels(width, height, rgb), true_colour=True))
    for row in range(height):
        for column in range(width):
            cell = screen.lines[row // 2][column]
            at = 3 * (row * width + column)
            assert cell.char == "▀"
            assert (cell.lower if row % 2 else cell.upper) == "2;" + ";".join(map(str, rgb[at : at + 3]))
    if height % 2:
        assert screen.lines[height // 2][0].lower == "49"  # the terminal's own
    assert screen.colours == ("", "")


def test_half_blocks_name_a_colour_once() -> None:
    assert half_blocks(Pixels(3, 2, bytes(18)), true_colour=True) == "\x1b[38;2;0;0;0;48;2;0;0;0m▀▀▀\x1b[0m"


@pytest.mark.parametrize(
    ("colour", "number"),
    [
        ((0, 0, 0), 16),
        ((255, 255, 255), 231),
        ((255, 0, 0), 196),
        ((95, 135, 215), 68),
        ((8, 8, 8), 232),
        ((128, 128, 128), 244),
        ((130, 127, 129), 244),
        ((238, 238, 238), 255),
        ((250, 5, 3), 196),
    ],
)
def test_the_nearest_of_256_colours(colour: tuple[int, int, int], number: int) -> None:
    written = half_blocks(Pixels(1, 1, bytes(colour)), true_colour=False)
    assert written == f"\x1b[38;5;{number};49m▀\x1b[0m"
