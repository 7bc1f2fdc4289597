"""One place on the terminal where pictures are drawn, each over the one before, above a line that goes on changing."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import secrets
import struct
import termios
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, TextIO

import msgspec

from mlxsup.cli.terminal import graphics
from mlxsup.cli.terminal.abilities import Abilities, Answer, ask, by_environment, discard_answer

if TYPE_CHECKING:
    from PIL import Image

_MOST_COLUMNS: Final = 40
_MOST_ROWS: Final = 20
_KEPT_ROWS: Final = 4
"""Of the screen: what was there before should not all be gone."""

_USUAL_SCREEN: Final = (24, 80)
_USUAL_CELL: Final = (8, 16)
"""Pixels, for terminals that do not tell: rather too small than over the edge."""

_MOST_PIXELS: Final = 50_000_000
_SENT_AS_IT_IS: Final = 1 << 18
"""Bytes of a PNG file that need not be made smaller for kitty."""
_MOST_SENT: Final = 1 << 22
"""Bytes of one that cannot be."""

_Way = Literal["kitty", "sixel", "blocks", "none"]


class _Box(msgspec.Struct, frozen=True):
    """A size in cells."""

    columns: int
    rows: int


class Canvas:
    """Draws pictures on the terminal behind a stream.

    It reserves rows at its first picture and draws into them from then on. Whatever it cannot read, or the terminal cannot
    show, is left out without a word: the picture itself is in its file.

    Args:
        stream: Where the terminal is written to; nothing is written here, but for a question to the terminal.
        abilities: What is known of the terminal.
    """

    def __init__(self, stream: TextIO, abilities: Abilities) -> None:
        self._abilities = abilities
        self._descriptor = stream.fileno()
        self._blocks = (stream.encoding or "").lower().replace("-", "") == "utf8"
        self._number = 1 + secrets.randbelow(2**31)
        self._way: _Way | None = None
        self._answer: Answer | None = None
        self._reserved = 0
        self._last: _Box | None = None

    @classmethod
    def on(cls, stream: TextIO, environ: Mapping[str, str]) -> Canvas | None:
        """Return a canvas for the terminal behind `stream`; None where no pictures are wanted."""
        abilities = by_environment(environ)
        return None if abilities is None else cls(stream, abilities)

    @property
    def sure(self) -> bool:
        """Whether the terminal is known to show pictures, without asking it."""
        known = self._abilities
        if known.kitty:
            return True
        return (known.sixel is True or (known.colours > 0 and self._blocks)) and _has_pillow()

    def draw(self, file: bytes) -> str:
        """Return what shows a picture file above the line that the cursor is in, "" when it cannot be shown.

        It is to be written with the cursor in an empty line, and leaves it in an empty line.
        """
        try:
            return self._draw(file)
        except Exception:  # noqa: BLE001 - Pillow raises many kinds; no picture is lost by one that is not shown
            return ""

    def close(self) -> None:
        """Leave the terminal as a shell expects it."""
        if self._answer is not None and not self._answer.came:
            discard_answer(os.ttyname(self._descriptor))

    def _draw(self, file: bytes) -> str:
        if self._way is None:
            self._way = self._find_way()
        if self._way == "none":
            return ""
        rows, columns, cell = self._screen()
        box_limit = _Box(min(_MOST_COLUMNS, columns - 1), self._reserved or min(_MOST_ROWS, rows - _KEPT_ROWS))
        if box_limit.columns < 2 or box_limit.rows < 2:
            return ""
        if self._way == "kitty":
            return self._placed(*self._as_kitty(file, box_limit, cell))
        image = _opened(file)
        box = _fitting(image.size, box_limit, cell)
        if self._way == "sixel":
            pixels = _indexed(image.resize((box.columns * cell[0], box.rows * cell[1])))
            return self._placed(graphics.sixel(pixels), box)
        small = image.resize((box.columns, 2 * box.rows))
        blocks = graphics.Pixels(*small.size, small.tobytes())
        return self._placed(graphics.half_blocks(blocks, true_colour=self._abilities.colours > 256), box)

    def _find_way(self) -> _Way:
        known = self._abilities
        if known.kitty:
            return "kitty"
        if not _has_pillow():
            return "none"
        if known.sixel is None:
            self._answer = ask(os.ttyname(self._descriptor))
        if known.sixel or (self._answer is not None and self._answer.sixel):
            return "sixel"
        return "blocks" if known.colours and self._blocks else "none"

    def _screen(self) -> tuple[int, int, tuple[int, int]]:
        """Return rows, columns and the size of a cell in pixels."""
        told = fcntl.ioctl(self._descriptor, termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", told)
        if not (rows and columns):
            rows, columns = _USUAL_SCREEN
        cell = (width // columns, height // rows)
        if not all(cell):
            cell = (self._answer.cell if self._answer else None) or _USUAL_CELL
        return rows, columns, cell

    def _as_kitty(self, file: bytes, limit: _Box, cell: tuple[int, int]) -> tuple[str, _Box]:
        size = _size_of_png(file)
        if size is None or (len(file) > _SENT_AS_IT_IS and _has_pillow()):
            image = _opened(file)
            box = _fitting(image.size, limit, cell)
            wanted = (2 * box.columns * cell[0], 2 * box.rows * cell[1])  # twice: many screens are finer than they tell
            image.thumbnail(wanted)
            buffer = io.BytesIO()
            image.save(buffer, "png", compress_level=1)
            file = buffer.getvalue()
        elif len(file) > _MOST_SENT:
            raise ValueError("too large to be sent as it is")
        else:
            box = _fitting(size, limit, cell)
        return graphics.kitty(file, number=self._number, columns=box.columns, rows=box.rows), box

    def _placed(self, drawn: str, box: _Box) -> str:
        """Put the drawing into our rows: make them first, or clear what a picture of another size has left there."""
        before = after = ""
        if not self._reserved:
            self._reserved = box.rows
            before = "\n" * box.rows
        elif box != self._last:
            after = "\x1b[2K\x1b[B" * self._reserved + f"\x1b[{self._reserved}A"
        self._last = box
        return f"\r{before}\x1b7\x1b[{self._reserved}A{after}{drawn}\x1b8"


def _fitting(size: tuple[int, int], limit: _Box, cell: tuple[int, int]) -> _Box:
    """Return the largest box within the limit that has the picture's proportions."""
    columns_a_row = size[0] / size[1] * cell[1] / cell[0]
    columns = max(1, min(limit.columns, round(limit.rows * columns_a_row)))
    return _Box(columns, max(1, min(limit.rows, round(columns / columns_a_row))))


def _has_pillow() -> bool:
    return importlib.util.find_spec("PIL") is not None


def _opened(file: bytes) -> Image.Image:
    """Read a picture file as RGB. Raises whatever Pillow does, and ValueError for one that is too large."""
    from PIL import Image

    with warnings.catch_warnings(action="ignore"):  # of large ones, which are refused here
        image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP"))
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError("too large to be shown")
    return image.convert("RGB")


def _indexed(image: Image.Image) -> graphics.IndexedPixels:
    from PIL.Image import Quantize

    few = image.quantize(256, method=Quantize.FASTOCTREE)  # its even areas make a third of what others have to write
    flat = few.getpalette("RGB") or []
    palette = [(flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3)]
    return graphics.IndexedPixels(*few.size, few.tobytes(), palette)


def _size_of_png(file: bytes) -> tuple[int, int] | None:
    """Return width and height out of a PNG file's header."""
    if not file.startswith(b"\x89PNG\r\n\x1a\n") or file[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", file[16:24])
    return (width, height) if width and height else None
