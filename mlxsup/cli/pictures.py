"""Files of pictures: what is read whole or refused, and what is found unwritable before any work and never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from mlxsup.cli.failures import CommandFailed
from mlxsup.errors import InvalidRequest
from mlxsup.protocol import OutputFormat

LARGEST_INPUT: Final = 64 << 20
"""Bytes of one picture that is read."""

_FORMATS: Final[dict[str, OutputFormat]] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_SUFFIXES: Final[dict[OutputFormat, str]] = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


def read_picture(path: Path) -> bytes:
    """Read a picture that is to be worked on.

    Raises:
        InvalidRequest: there is none, or it is empty or too large.
    """
    try:
        with path.expanduser().open("rb") as file:
            found = file.read(LARGEST_INPUT + 1)
    except OSError as error:
        raise InvalidRequest(f"--image: {path} cannot be read: {error.strerror}") from error
    if not found:
        raise InvalidRequest(f"--image: {path} is empty")
    if len(found) > LARGEST_INPUT:
        raise InvalidRequest(f"--image: {path} is larger than {LARGEST_INPUT >> 20} MiB")
    return found


def chosen_format(output: Path | None, asked: OutputFormat | None) -> OutputFormat | None:
    """Return the kind of file to ask for: as asked, else as the name of the output says; None for what comes anyway (png).

    Raises:
        InvalidRequest: the two contradict each other.
    """
    named = _FORMATS.get(output.suffix.lower()) if output else None
    if asked and named and asked != named:
        raise InvalidRequest(f"--format {asked} and --output {output} contradict each other; leave one of them out")
    return asked or (named if named != "png" else None)


class PictureFile:
    """A file that is to hold a picture. `written` is its size once it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0

    @classmethod
    def at(cls, output: Path | None, name: str, kind: OutputFormat | None = None) -> PictureFile:
        """Return the file at `output`, else one in the current folder called `name`, with the suffix of its kind (png).

        Raises:
            CommandFailed: it could not be written, as far as that can be told now.
        """
        path = output.expanduser() if output else Path(name.replace("/", "-") + _SUFFIXES[kind or "png"])
        folder = path.resolve().parent
        if path.is_dir():
            raise CommandFailed(f"{path} is a folder; give --output a file in it")
        if not folder.is_dir():
            raise CommandFailed(
                f"{path} cannot be written: there is no folder {folder}; make it, or give another --output"
            )
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise CommandFailed(f"{path} cannot be written: permission denied; give another --output")
        return cls(path)

    def write(self, picture: bytes) -> None:
        """Put the picture in place, at once or not at all.

        Raises:
            CommandFailed: the file system refuses.
        """
        try:
            if self.path.exists() and not self.path.is_file():  # /dev/stdout, a pipe: nothing to put in place of it
                self.path.write_bytes(picture)
            else:
                _replace(self.path.resolve(), picture)
        except OSError as error:
            raise CommandFailed(f"{self.path} cannot be written: {error.strerror}; give another --output") from error
        self.written = len(picture)


def _replace(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
