"""From pixels to what a terminal reads: kitty's graphics protocol, sixel, and blocks of two colours.

Pure functions. What they return is written where the picture's upper left corner is to be, and the cursor ends anywhere
within the picture or just behind it; nothing here scrolls as long as there is room for the picture.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import msgspec

_KITTY_CHUNK: Final = 4096
"""Characters of base64 in one escape sequence, the protocol's limit."""

_LEVELS: Final = (0, 95, 135, 175, 215, 255)
"""Of red, green and blue in the 6 x 6 x 6 cube of the 256 colours."""

_RUN = re.compile(r"(.)\1{3,}")


class Pixels(msgspec.Struct, frozen=True):
    """A picture of `width` x `height` pixels; `rgb` has three bytes a pixel, row by row from the top."""

    width: int
    height: int
    rgb: bytes


class IndexedPixels(msgspec.Struct, frozen=True):
    """A picture of at most 256 colours; `indices` has one byte a pixel, a place in `palette`, row by row from the top."""

    width: int
    height: int
    indices: bytes
    palette: list[tuple[int, int, int]]


def kitty(png: bytes, *, number: int, columns: int, rows: int) -> str:
    """Show a PNG file, scaled to `columns` x `rows` cells, in place of the picture that had this `number` (1 to 2**32-1).

    The terminal is told not to answer (q=2), or its answer would be typed at the next prompt, and to leave the cursor alone.
    """
    data = base64.b64encode(png).decode()
    keys = f"a=T,f=100,t=d,i={number},p=1,c={columns},r={rows},C=1,"
    written = []
    for start in range(0, len(data), _KITTY_CHUNK):
        more = int(start + _KITTY_CHUNK < len(data))
        written.append(f"\x1b_G{keys}q=2,m={more};{data[start : start + _KITTY_CHUNK]}\x1b\\")
        keys = ""
    return "".join(written)


def sixel(picture: IndexedPixels) -> str:
    """Show a picture in its own size in pixels, six rows of them at a time."""
    width = picture.width
    written = [f'\x1bP0;1;0q"1;1;{width};{picture.height}']
    for number, colour in enumerate(picture.palette):
        red, green, blue = (round(part * 100 / 255) for part in colour)
        written.append(f"#{number};2;{red};{green};{blue}")
    rows = [picture.indices[start : start + width] for start in range(0, len(picture.indices), width)]
    written.append("-".join("$".join(_band(rows[top : top + 6])) for top in range(0, len(rows), 6)))
    written.append("\x1b\\")
    return "".join(written)


def _band(rows: list[bytes]) -> Iterator[str]:
    """Write six rows: for each colour in them its places, as one character for each column."""
    width = len(rows[0])
    nothing = int.from_bytes(b"?" * width)
    for number in sorted(set().union(*rows)):
        places = nothing  # six bits a byte: sums of bytes never carry
        for place, row in enumerate(rows):
            if number in row:
                places += int.from_bytes(row.translate(_only(number))) << place
        line = places.to_bytes(width).decode().rstrip("?")
        yield f"#{number}" + _RUN.sub(lambda run: f"!{len(run[0])}{run[1]}", line)


@lru_cache(maxsize=256)
def _only(number: int) -> bytes:
    """Return the table that makes 1 of this byte and 0 of every other one."""
    return bytes(other == number for other in range(256))


def half_blocks(picture: Pixels, *, true_colour: bool) -> str:
    """Show a picture of two pixels a cell: the upper one in the colour of a block, the lower one in that of its ground."""
    stride = 3 * picture.width
    rows = [picture.rgb[start : start + stride] for start in range(0, len(picture.rgb), stride)]
    name = _true_colour if true_colour else _one_of_256
    lines = []
    for top in range(0, len(rows), 2):
        line = []
        last: tuple[str, str] | None = None
        lower = rows[top + 1] if top + 1 < len(rows) else None
        for at in range(0, stride, 3):
            ground = "49" if lower is None else f"48;{name(*lower[at : at + 3])}"
            colours = f"38;{name(*rows[top][at : at + 3])}", ground
            if colours != last:
                line.append(f"\x1b[{';'.join(colours)}m")
                last = colours
            line.append("▀")
        lines.append("".join(line) + "\x1b[0m")
    return "\r\x1b[B".join(lines)


def _true_colour(red: int, green: int, blue: int) -> str:
    return f"2;{red};{green};{blue}"


@lru_cache(maxsize=4096)
def _one_of_256(red: int, green: int, blue: int) -> str:
    """Return the nearest of the cube's colours and the greys."""
    sides = [_side(part) for part in (red, green, blue)]
    cube = [_LEVELS[side] for side in sides]
    grey = min(23, max(0, round(((red + green + blue) / 3 - 8) / 10)))
    level = 8 + 10 * grey

    def distance(*other: int) -> int:
        return sum((one - two) ** 2 for one, two in zip((red, green, blue), other, strict=True))

    if distance(level, level, level) < distance(*cube):
        return f"5;{232 + grey}"
    return f"5;{16 + 36 * sides[0] + 6 * sides[1] + sides[2]}"


def _side(part: int) -> int:
    return min(range(len(_LEVELS)), key=lambda place: abs(_LEVELS[place] - part))
