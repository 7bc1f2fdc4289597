"""The place where pictures are drawn: how large they are, and what is not drawn at all."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest
from PIL import Image

from mlxsup.cli.terminal.abilities import Abilities
from mlxsup.cli.terminal.canvas import Canvas
from tests.cli.terminals import Screen

KITTY = Abilities(kitty=True)
BLOCKS = Abilities(sixel=False, colours=256)


@pytest.fixture
def terminal() -> Iterator[io.TextIOWrapper]:
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w", encoding="utf-8") as stream:
            yield stream
    finally:
        os.close(master)


def _resize(stream: io.TextIOWrapper, rows: int, columns: int, cell: tuple[int, int] = (0, 0)) -> None:
    fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, cell[0] * columns, cell[1] * rows))


def _file(size: tuple[int, int], kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rows", "columns", "cell", "size", "expected"),
    [
        (50, 120, (0, 0), (512, 512), (40, 20)),
        (50, 120, (10, 25), (512, 512), (40, 16)),
        (50, 120, (0, 0), (1024, 512), (40, 10)),
        (50, 120, (0, 0), (512, 1024), (20, 20)),
        (50, 120, (0, 0), (2000, 10), (40, 1)),
        (50, 120, (0, 0), (10, 2000), (1, 20)),
        (14, 120, (0, 0), (512, 512), (20, 10)),
        (50, 21, (0, 0), (512, 512), (20, 10)),
        (0, 0, (0, 0), (512, 512), (40, 20)),
    ],
)
def test_a_picture_keeps_its_shape_and_leaves_room_for_others(
    terminal: io.TextIOWrapper,
    rows: int,
    columns: int,
    cell: tuple[int, int],
    size: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    _resize(terminal, rows, columns, cell)
    screen = Screen()
    screen.feed(Canvas(terminal, KITTY).draw(_file(size)))
    ((keys, _, _),) = screen.kitty_pictures()
    assert (int(keys["c"]), int(keys["r"])) == expected
    assert screen.line == expected[1]


@pytest.mark.parametrize(("rows", "columns"), [(5, 80), (24, 2)])
def test_a_tiny_screen_has_no_room(terminal: io.TextIOWrapper, rows: int, columns: int) -> None:
    _resize(terminal, rows, columns)
    assert Canvas(terminal, KITTY).draw(_file((8, 8))) == ""


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_that_kitty_cannot_read_or_that_is_large_is_sent_small(terminal: io.TextIOWrapper, kind: str) -> None:
    _resize(terminal, 50, 120, (10, 20))
    buffer = io.BytesIO()
    Image.effect_noise((1000, 1000), 100).convert("RGB").save(buffer, kind)
    assert len(buffer.getvalue()) > 1 << 18
    screen = Screen()
    screen.feed(Canvas(terminal, KITTY).draw(buffer.getvalue()))
    ((_, file, _),) = screen.kitty_pictures()
    image = Image.open(io.BytesIO(file))
    assert (image.format, image.size) == ("PNG", (800, 800))


@pytest.mark.parametrize("abilities", [KITTY, BLOCKS, Abilities(sixel=True)])
@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\0\0\0\0\0",
        _file((8, 8), "jpeg")[:40],
        _file((8, 8), "gif"),
    ],
)
def test_what_is_no_picture_takes_no_room(terminal: io.TextIOWrapper, abilities: Abilities, file: bytes) -> None:
    canvas = Canvas(terminal, abilities)
    assert canvas.draw(file) == ""
    assert canvas.draw(_file((8, 8))) != ""


def test_a_bomb_is_not_opened(terminal: io.TextIOWrapper) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "png")
    assert Canvas(terminal, BLOCKS).draw(buffer.getvalue()) == ""


@pytest.mark.parametrize(
    ("abilities", "sure"),
    [
        (KITTY, True),
        (BLOCKS, True),
        (Abilities(sixel=True), True),
        (Abilities(colours=256), True),
        (Abilities(), False),
    ],
)
def test_it_is_sure_of_what_needs_no_question(terminal: io.TextIOWrapper, abilities: Abilities, sure: bool) -> None:
    assert Canvas(terminal, abilities).sure is sure


def test_the_next_program_gets_another_number(terminal: io.TextIOWrapper) -> None:
    first, second = Canvas(terminal, KITTY).draw(_file((8, 8))), Canvas(terminal, KITTY).draw(_file((8, 8)))
    assert first != second  # or it would take the first one's picture off the screen
