"""A terminal for the tests: what it shows after all that was written to it, and a program run on it as a shell would."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio

LIMIT: Final = 16.0

_SHELL = """
import fcntl, json, os, select, signal, subprocess, sys, termios
signal.signal(signal.SIGINT, lambda *_: None)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
before = termios.tcgetattr(0)
code = subprocess.call(sys.argv[2:])
after = termios.tcgetattr(0)
raw = termios.tcgetattr(0)
raw[3] &= ~termios.ICANON
termios.tcsetattr(0, termios.TCSANOW, raw)
typed = os.read(0, 4096).decode() if select.select([0], [], [], 0)[0] else ""
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "restored": before == after, "typed": typed}, file)
"""
"""Owns the terminal, runs a program in the foreground, then tells how it has left the terminal, and what is still to be read."""

_TOKEN = re.compile(
    r"\x1b\[(?P<csi>[?>]?[0-9;]*)(?P<final>[A-Za-z])|\x1b(?P<string>[_P])(?P<body>.*?)\x1b\\|\x1b(?P<escape>[78])|(?P<char>.)",
    re.DOTALL,
)
_COLOURS = re.compile(r"38;(2;\d+;\d+;\d+|5;\d+);(?:48;(2;\d+;\d+;\d+|5;\d+)|49)")


@dataclass
class Cell:
    char: str = " "
    upper: str = ""
    lower: str = ""


@dataclass
class Drawing:
    """A picture that was written: the body of its sequence, and the line (counted from the first ever) it begins in."""

    kind: str
    body: str
    line: int
    column: int


@dataclass
class Screen:
    """What a terminal of some size shows. What it does not know is an error."""

    rows: int = 30
    columns: int = 90
    lines: list[list[Cell]] = field(default_factory=list)
    line: int = 0
    column: int = 0
    saved: tuple[int, int] = (0, 0)
    drawings: list[Drawing] = field(default_factory=list)
    colours: tuple[str, str] = ("", "")

    def feed(self, text: str) -> None:
        self._make(0)
        for token in _TOKEN.finditer(text):
            if token["char"]:
                self._char(token["char"])
            elif token["final"]:
                self._control(token["csi"], token["final"])
            elif token["escape"] == "7":
                self.saved = self.line, self.column
            elif token["escape"] == "8":
                self.line, self.column = self.saved
            else:
                kind = {"_": "kitty", "P": "sixel"}[token["string"]]
                self.drawings.append(Drawing(kind, token["body"], self.line, self.column))

    def text(self) -> list[str]:
        return ["".join(cell.char for cell in line).rstrip() for line in self.lines]

    def kitty_pictures(self) -> list[tuple[dict[str, str], bytes, Drawing]]:
        """Put the chunks of pictures together: the keys of the first one, the file, and where it was drawn."""
        found = []
        keys: dict[str, str] = {}
        data, first = "", None
        for drawing in self.drawings:
            told, _, part = drawing.body.removeprefix("G").partition(";")
            assert len(part) <= 4096
            now = dict(pair.split("=") for pair in told.split(","))
            assert now["q"] == "2"
            first = first or drawing
            keys, data = {**now, **keys}, data + part
            if now["m"] == "0":
                found.append((keys, base64.b64decode(data, validate=True), first))
                keys, data, first = {}, "", None
        assert first is None
        return found

    @property
    def _top(self) -> int:
        return max(0, len(self.lines) - self.rows)

    def _make(self, line: int) -> None:
        while len(self.lines) <= line:
            self.lines.append([Cell() for _ in range(self.columns)])

    def _char(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.line += 1
            self._make(self.line)
        else:
            assert char.isprintable(), repr(char)
            if self.column == self.columns:
                self._char("\r")
                self._char("\n")
            self.lines[self.line][self.column] = Cell(char, *self.colours)
            self.column += 1

    def _control(self, told: str, final: str) -> None:
        if told.startswith("?") or final in "ct":
            return  # the cursor is hidden and shown; questions
        number = int(told or {"K": "0", "m": "0"}.get(final, "1")) if ";" not in told else 0
        if final == "A":
            assert self.line - number >= self._top, "above the screen"
            self.line -= number
        elif final == "B":
            self.line = min(len(self.lines) - 1, self.line + number)
        elif final == "K":
            assert number == 2
            self.lines[self.line] = [Cell() for _ in range(self.columns)]
        elif final == "m":
            found = _COLOURS.fullmatch(told)
            self.colours = (found[1], found[2] or "49") if found else ("", "")
        else:
            raise AssertionError(f"CSI {told} {final}")


@dataclass
class Ended:
    """How a program ended: its exit code, what its terminal shows, whether that is as it was, and what is left to be read."""

    code: int
    restored: bool
    typed: str
    written: str
    screen: Screen


class Terminal:
    """A program that runs on a pseudo-terminal; `answer` is what it is told when it asks for attributes."""

    def __init__(self, master: int, report: Path, screen: Screen, answer: str) -> None:
        self.written = bytearray()
        self._master = master
        self._report = report
        self._screen = screen
        self._answer = answer
        self._more = asyncio.Condition()
        self._ended = False

    def type(self, text: str) -> None:
        """Type as a person, or answer as a terminal."""
        os.write(self._master, text.encode())

    async def shows(self, words: str) -> None:
        """Wait until this has been written."""
        with anyio.fail_after(LIMIT):
            async with self._more:
                await self._more.wait_for(lambda: words.encode() in self.written or self._ended)
        assert words.encode() in self.written

    async def ended(self) -> Ended:
        with anyio.fail_after(LIMIT):
            async with self._more:
                await self._more.wait_for(lambda: self._ended)
        text = self.written.decode(errors="replace")  # what is echoed may fall into the middle of a character
        self._screen.feed(text)
        report: dict[str, Any] = json.loads(self._report.read_text())
        return Ended(**report, written=text, screen=self._screen)

    async def pump(self) -> None:
        asked = 0
        with contextlib.suppress(OSError):  # Linux: EIO once the other end is closed
            while True:
                await anyio.wait_readable(self._master)
                if not (part := os.read(self._master, 65536)):
                    break
                async with self._more:
                    self.written += part
                    self._more.notify_all()
                questions = self.written.count(b"\x1b[c")
                if self._answer and questions > asked:
                    self.type(self._answer)
                asked = questions
        async with self._more:
            self._ended = True
            self._more.notify_all()


@contextlib.asynccontextmanager
async def on_terminal(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str],
    answer: str = "",
    cell: tuple[int, int] = (0, 0),
    rows: int = 30,
    program: tuple[str, ...] = ("-m", "mlxsup"),
) -> AsyncIterator[Terminal]:
    """Run `mlxsup ARGUMENTS` on a terminal; `env` is all that tells of the terminal, `cell` the pixels that the system tells."""
    screen = Screen(rows=rows)
    master, slave = pty.openpty()
    size = struct.pack("HHHH", screen.rows, screen.columns, cell[0] * screen.columns, cell[1] * screen.rows)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    report = cwd / "terminal.json"
    about = ("TERM", "NO_COLOR", "COLOR", "KITTY", "KONSOLE", "TMUX", "STY", "COLUMNS", "LINES", "VTE", "WEZTERM")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(about)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SHELL, str(report), sys.executable, *program, *arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env={**environ, "PYTHONUTF8": "1", **env},
        start_new_session=True,
    )
    os.close(slave)
    terminal = Terminal(master, report, screen, answer)
    pump = asyncio.create_task(terminal.pump())
    try:
        yield terminal
        with anyio.fail_after(LIMIT):
            await process.wait()
            await pump
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        os.close(master)
