"""Shows an answer as it comes: a step bar on a terminal, plain lines elsewhere, or a line of JSON for each chunk.

Text goes to stdout and pictures to their file; everything that is said about them goes to stderr.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any, Self

import msgspec

from mlxsup.cli.pictures import PictureFile
from mlxsup.cli.units import human_size
from mlxsup.protocol import CompletionChunk


def display(model: str, picture: PictureFile, *, as_json: bool) -> Display:
    """Return the display that fits where our output goes."""
    if as_json:
        return JsonDisplay(model, picture)
    return TerminalDisplay(model, picture) if sys.stderr.isatty() else Display(model, picture)


class Display:
    """Plain lines: text to stdout, one line a step to stderr, and one about the picture."""

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
            BadAnswer: its picture is none.
        """
        if chunk.step is not None and chunk.total is not None and (chunk.step, chunk.total) != self._last_step:
            self._last_step = chunk.step, chunk.total  # a long last step is repeated, as a sign of life
            self._step(chunk.step, chunk.total)
        if chunk.content:
            self._text(chunk.content)
        if chunk.image:
            self._picture.write(chunk.image_bytes())
            self._wrote(chunk)

    def _step(self, step: int, total: int) -> None:
        _err(f"step {step}/{total}")

    def _text(self, content: str) -> None:
        _out(content)
        self._open_line = not content.endswith("\n")

    def _wrote(self, chunk: CompletionChunk) -> None:
        seed = "" if chunk.seed is None else f", seed {chunk.seed}"
        _err(f"{self._picture.path}: {human_size(self._picture.written)}{seed}, {time.monotonic() - self._began:.1f} s")


class TerminalDisplay(Display):
    """A bar that counts the steps, gone when the picture is there or the text begins."""

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

    def _wrote(self, chunk: CompletionChunk) -> None:
        self._live.close()
        super()._wrote(chunk)


class JsonDisplay(Display):
    """Each chunk as a line of JSON; in place of a picture it names the `output` file and its size in bytes."""

    def show(self, chunk: CompletionChunk) -> None:
        """Print one chunk."""
        line: dict[str, Any] = msgspec.to_builtins(chunk)
        if chunk.image:
            self._picture.write(chunk.image_bytes())
            line["image"] = ""
            line |= {"output": str(self._picture.path), "bytes": self._picture.written}
        _out(msgspec.json.encode(line).decode() + "\n")


def _out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _err(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
