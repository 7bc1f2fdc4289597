"""What a terminal can show: as its environment tells, and by asking it where that does not.

Sixel is asked for, with the sequence that every terminal answers (DA1), as xterm, tmux and the terminals of editors do not
announce it in any other way. The question is put only while our process is the one that the keyboard belongs to, nothing
has been typed ahead, and its answer is awaited without echo; the terminal's settings are put back in any case.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import termios
import time
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

ANSWER_TIMEOUT: Final = 0.5
"""Seconds that the terminal has to answer; over a slow line it takes a round trip."""

_QUESTION: Final = b"\x1b[16t\x1b[c"
"""The size of a cell in pixels, which not all know, and the attributes, which all do: so that is the end of the answer."""

_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]+)c")
_CELL = re.compile(rb"\x1b\[6;([0-9]{1,4});([0-9]{1,4})t")
_KITTY_TERMS: Final = ("xterm-kitty", "xterm-ghostty")
_KITTY_PROGRAMS: Final = ("ghostty", "WezTerm", "konsole")
_KONSOLE: Final = 220400
"""The first release of Konsole that shows pictures, as its variable writes it."""
_SIXEL_TERMS: Final = ("foot", "mlterm", "contour", "yaft")


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a terminal can: `sixel` is None where only the terminal itself knows, `colours` the number it has for text."""

    kitty: bool = False
    sixel: bool | None = None
    colours: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the terminal said of itself; `cell` is width and height in pixels, `came` False for a silent one."""

    came: bool = True
    sixel: bool = False
    cell: tuple[int, int] | None = None


def by_environment(environ: Mapping[str, str]) -> Abilities | None:
    """Tell what the terminal of this environment can show; None where no pictures are wanted."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if environ.get("NO_COLOR") or term in ("", "dumb", "unknown"):
        return None
    if environ.get("COLORTERM") in ("truecolor", "24bit") or "direct" in term or term in _KITTY_TERMS:
        colours = 1 << 24
    else:
        colours = 256 if "256color" in term else 0
    if "TMUX" in environ or "STY" in environ or term.startswith(("tmux", "screen")):
        return Abilities(colours=colours)  # variables of the terminal around it tell nothing
    if term in _KITTY_TERMS or _is_kitty(environ, program):
        return Abilities(kitty=True, colours=colours)
    if term.startswith(_SIXEL_TERMS) or program == "iTerm.app":
        return Abilities(sixel=True, colours=colours)
    return Abilities(sixel=False if program == "Apple_Terminal" else None, colours=colours)


def _is_kitty(environ: Mapping[str, str], program: str) -> bool:
    """Tell whether the program speaks kitty's protocol; other programs started by such a one inherit its variables."""
    if program:
        return program in _KITTY_PROGRAMS
    version = environ.get("KONSOLE_VERSION", "")
    return "KITTY_WINDOW_ID" in environ or (version.isdecimal() and int(version) >= _KONSOLE)


def ask(device: str, timeout: float = ANSWER_TIMEOUT) -> Answer | None:
    """Ask the terminal at `device` what it can; None when it is better not asked. Blocks for `timeout` seconds at most."""
    try:
        terminal = os.open(device, os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return None  # in the background: to read, or to change settings, would stop us
        with _silently(terminal):
            if _readable(terminal, 0):
                return None  # what was typed ahead is for the shell
            os.write(terminal, _QUESTION)
            return _read_answer(terminal, time.monotonic() + timeout)
    except (OSError, termios.error):
        return None
    finally:
        os.close(terminal)


def discard_answer(device: str) -> None:
    """Throw away what the terminal has typed since, for one that did not answer in time."""
    with contextlib.suppress(OSError, termios.error):
        terminal = os.open(device, os.O_RDWR | os.O_NOCTTY)
        try:
            if os.tcgetpgrp(terminal) == os.getpgrp():
                termios.tcflush(terminal, termios.TCIFLUSH)
        finally:
            os.close(terminal)


@contextlib.contextmanager
def _silently(terminal: int) -> Iterator[None]:
    """Read single characters and show none of them; Ctrl-C stays what it is."""
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~(termios.ICANON | termios.ECHO)
    silent[6][termios.VMIN], silent[6][termios.VTIME] = 1, 0
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _readable(terminal: int, timeout: float) -> bool:
    return bool(select.select([terminal], [], [], timeout)[0])


def _read_answer(terminal: int, deadline: float) -> Answer:
    seen = b""
    while _readable(terminal, max(0.0, deadline - time.monotonic())):
        seen += os.read(terminal, 256)
        if found := _ATTRIBUTES.search(seen):
            cell = _CELL.search(seen)
            width, height = (int(cell[2]), int(cell[1])) if cell else (0, 0)
            attributes = found[1].split(b";")[1:]  # the first is its class
            return Answer(sixel=b"4" in attributes, cell=(width, height) if width and height else None)
    return Answer(came=False)
