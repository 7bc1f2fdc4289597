"""Shows an answer as it comes: a step bar on a terminal, plain lines elsewhere, or a line of JSON for each chunk.

Text goes to stdout and pictures to their file; everything that is said about them goes to stderr. So do the drawings of them
that a terminal may be able to show, above the bar.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from mlxsup.cli.failures import tell
from mlxsup.cli.pictures import PictureFile
from mlxsup.cli.streams import json_line
from mlxsup.cli.terminal.canvas import Canvas
from mlxsup.cli.units import human_size
from mlxsup.errors import BadAnswer
from mlxsup.protocol import CompletionChunk

if TYPE_CHECKING:
    from rich.console import RenderResult


def display(model: str, picture: PictureFile, *, as_json: bool, draws: bool) -> Display:
    """Return the display that fits where our output goes; with `draws` it shows pictures where it can."""
    if as_json:
        return JsonDisplay(model, picture)
    if not sys.stderr.isatty():
        return Display(model, picture)
    return TerminalDisplay(model, picture, Canvas.on(sys.stderr, os.environ) if draws else None)


class Display:
    """Plain lines: text to stdout, one line a step to stderr, and one about the picture.

    `draws` says whether it is known to show pictures, so that previews are worth the work.
    """

    draws = False

    def __init__(self, model: str, picture: PictureFile) -> None:
        self._model = model
        self._picture = picture
        self._began = time.monotonic()
        self._open_line = False
        self._last_step = (-1, -1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_line:
            _out("\n")

    def show(self, chunk: CompletionChunk) -> None:
        """Show one chunk of the answer.

        Raises:
            CommandFailed: its picture cannot be written.
            BadAnswer: its picture is none. A broken preview is left out.
        """
        if chunk.step is not None and chunk.total is not None and (chunk.step, chunk.total) != self._last_step:
            self._last_step = chunk.step, chunk.total  # a long last step is repeated, as a sign of life
            self._step(chunk.step, chunk.total)
        if chunk.content:
            self._text(chunk.content)
        if chunk.image and chunk.preview:
            self._preview(chunk)
        elif chunk.image:
            picture = chunk.image_bytes()
            self._picture.write(picture)
            self._wrote(chunk, picture)

    def _step(self, step: int, total: int) -> None:
        tell(f"step {step}/{total}")

    def _text(self, content: str) -> None:
        _out(content)
        self._open_line = not content.endswith("\n")

    def _preview(self, chunk: CompletionChunk) -> None:
        """Plain lines have no place for it."""

    def _wrote(self, chunk: CompletionChunk, picture: bytes) -> None:
        del picture
        seed = "" if chunk.seed is None else f", seed {chunk.seed}"
        tell(f"{self._picture.path}: {human_size(self._picture.written)}{seed}, {time.monotonic() - self._began:.1f} s")


class TerminalDisplay(Display):
    """A bar that counts the steps, gone when the picture is there or the text begins; above it what the picture looks like."""

    def __init__(self, model: str, picture: PictureFile, canvas: Canvas | None) -> None:
        super().__init__(model, picture)
        self._canvas = canvas
        self.draws = canvas is not None and canvas.sure

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._live = contextlib.ExitStack()
        if self._canvas is not None:
            self._live.callback(self._canvas.close)
        self._bar = self._live.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
        self._task = self._bar.add_task(f"{self._model}: loading", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.close()
        super().__exit__(kind, error, trace)

    def _step(self, step: int, total: int) -> None:
        self._bar.update(self._task, description=self._model, completed=step, total=total, refresh=step == total)

    def _text(self, content: str) -> None:
        self._live.close()
        super()._text(content)

    def _preview(self, chunk: CompletionChunk) -> None:
        with contextlib.suppress(BadAnswer):
            self._draw(chunk.image_bytes())

    def _wrote(self, chunk: CompletionChunk, picture: bytes) -> None:
        self._draw(picture)
        self._live.close()
        super()._wrote(chunk, picture)

    def _draw(self, picture: bytes) -> None:
        """Print above the bar, which takes itself away before and comes back after."""
        if self._canvas is not None and (drawn := self._canvas.draw(picture)):
            self._bar.console.print(_Drawn(drawn), end="")


class _Drawn:
    """What a terminal shows as a picture, for rich: it takes no room, as the canvas has made room itself."""

    def __init__(self, drawn: str) -> None:
        self._drawn = drawn

    def __rich_console__(self, *_: object) -> RenderResult:
        from rich.segment import ControlType, Segment

        yield Segment(self._drawn, None, [(ControlType.CARRIAGE_RETURN,)])


class JsonDisplay(Display):
    """Each chunk as a line of JSON; in place of the picture it names the `output` file and its size in bytes.

    Previews have no file: they stay in their lines, in base64.
    """

    def show(self, chunk: CompletionChunk) -> None:
        """Print one chunk."""
        line: dict[str, Any] = msgspec.to_builtins(chunk)
        if chunk.image and not chunk.preview:
            self._picture.write(chunk.image_bytes())
            line["image"] = ""
            line |= {"output": str(self._picture.path), "bytes": self._picture.written}
        _out(json_line(line))


def _out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
