"""The file a picture goes to: found unwritable before any work is done, and never left half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mlxsup.cli.failures import CommandFailed


class PictureFile:
    """A file that is to hold a picture. `written` is its size once it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0

    @classmethod
    def at(cls, output: Path | None, name: str) -> PictureFile:
        """Return the file at `output`, else `name`.png in the current folder.

        Raises:
            CommandFailed: it could not be written, as far as that can be told now.
        """
        path = output.expanduser() if output else Path(name.replace("/", "-") + ".png")
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
