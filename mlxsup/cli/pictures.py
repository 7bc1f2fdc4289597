"""Files of pictures: what is read whole or refused, and what is found unwritable before any work and never half written."""

from __future__ import annotations

import contextlib
import errno
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
        with expanded(path).open("rb") as file:
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


def expanded(path: Path) -> Path:
    """Fill in a leading `~`; that of a user who is not known stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for these


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
        path = expanded(output) if output else Path(name.replace("/", "-") + _SUFFIXES[kind or "png"])
        place = _place(path)
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir may raise
            raise CommandFailed(f"{path} is a folder; give --output a file in it")
        if not os.path.isdir(place.parent):  # noqa: PTH112
            raise CommandFailed(
                f"{path} cannot be written: there is no folder {place.parent}; make it, or give another --output"
            )
        try:
            _try(path)
        except OSError as error:
            raise CommandFailed(f"{path} cannot be written: {_reason(error)}; give another --output") from error
        return cls(path)

    def write(self, picture: bytes) -> None:
        """Put the picture in place, at once or not at all.

        Raises:
            CommandFailed: the file system refuses; says where the picture is instead, if anywhere.
        """
        try:
            if _is_special(self.path):
                self.path.write_bytes(picture)
            else:
                _replace(_place(self.path), picture)
        except OSError as error:
            kept = _kept_elsewhere(picture, self.path.suffix)
            instead = (
                f"the picture is in {kept}" if kept else "nor can the folder for temporary files; the picture is lost"
            )
            raise CommandFailed(f"{self.path} cannot be written: {_reason(error)}; {instead}") from error
        self.written = len(picture)


def _place(path: Path) -> Path:
    """Follow links: what they lead to is written, and they stay."""
    return Path(os.path.realpath(path))


def _is_special(path: Path) -> bool:
    """Tell whether there is something like /dev/stdout or a pipe, in whose place nothing can be put."""
    return path.exists() and not path.is_file()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _try(path: Path) -> None:
    """Find out whether a picture could be written there."""
    place = _place(path)
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not _is_special(path):
        descriptor, name = _beside(place)
        os.close(descriptor)
        Path(name).unlink()


def _beside(place: Path) -> tuple[int, str]:
    """Make the file that a picture is written to before it takes its place."""
    return tempfile.mkstemp(prefix=f".{place.name[:40]}.", dir=place.parent)


def _kept_elsewhere(picture: bytes, suffix: str) -> str:
    """Write the picture to the folder for temporary files; return its path, "" where that does not take it either."""
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix="mlxsup-", suffix=suffix[:10])
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(picture)
        except BaseException:
            Path(name).unlink()
            raise
        return name
    return ""


def _replace(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = _beside(path)
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
