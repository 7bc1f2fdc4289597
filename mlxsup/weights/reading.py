"""Reading model files within bounds: regular files only, headers only, and every fault an UnreadableModel that names the file.

Nothing here knows a format. Everything blocks for as long as the disk takes: call it off the loop.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from mlxsup.errors import LoadFailed, ResourceExhausted
from mlxsup.shortages import is_shortage

HEADER_LIMIT: Final = 100_000_000
"""Bytes of header that are read of one file; the safetensors library has the same limit."""

MANIFEST_LIMIT: Final = 32 * 1024**2
"""Bytes of a manifest, an index or a config; the index of a model of 671 billion parameters has 9 million."""

ENTRIES_LIMIT: Final = 200_000
"""Entries of one folder that are looked at."""

FILES_LIMIT: Final = 10_000
"""Files of weights that one model may have; stores that keep each tensor apart have some thousands."""

TENSORS_LIMIT: Final = 100_000
"""Tensors of one file; the largest models have that many in all their files together."""

_MARKS_LIMIT: Final = {b":": 10 * TENSORS_LIMIT, b",": 20 * TENSORS_LIMIT}
"""Of a JSON header: about twice what TENSORS_LIMIT tensors take. It bounds what a hostile one costs to decode."""

Path = str | os.PathLike[str]
T = TypeVar("T")


class UnreadableModel(LoadFailed):
    """A model's files are not there or not what they claim to be; nothing changes that without a person.

    Attributes of `details`: `permanent` (True), `cause` ("missing_file" or "bad_weights") and `path`, the file at fault.
    """

    source = "mlxsup"


def unreadable(path: Path, why: str, *, missing: bool = False) -> UnreadableModel:
    """Make the error for a file: `PATH: WHY`."""
    shown = readable(path)
    cause = "missing_file" if missing else "bad_weights"
    return UnreadableModel(f"{shown}: {why}", details={"permanent": True, "cause": cause, "path": shown})


def readable(path: Path) -> str:
    """Write a path so that it can be printed and sent as JSON; bytes that are no UTF-8 become question marks."""
    return os.fspath(path).encode(errors="replace").decode()


def brief(text: str) -> str:
    """Shorten a name that comes out of a file, for a message."""
    return text if len(text) <= 80 else f"{text[:79]}…"


class OpenFile:
    """A regular file open for reading at offsets; every read is within its size when it was opened."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self._descriptor = descriptor

    def at(self, offset: int, count: int) -> bytes:
        """Read exactly `count` bytes from `offset`.

        Raises:
            UnreadableModel: the file is shorter than that, or the disk fails.
        """
        if offset + count > self.size:
            raise unreadable(self.path, f"cut off: {self.size} bytes, but its header needs {offset + count}")
        pieces = []
        while count:
            try:
                piece = os.pread(self._descriptor, count, offset)
            except OSError as error:
                raise _failed(self.path, error) from error
            if not piece:
                raise unreadable(self.path, f"became shorter than {offset + count} bytes while it was read")
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a regular file; pipes, devices and folders are refused without waiting for them.

    Raises:
        UnreadableModel: it is not there, not ours to read, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(path, error) from error
    except ValueError as error:  # a NUL byte in the name, or half a surrogate pair
        raise unreadable(path, f"no file name: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise unreadable(path, "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        yield OpenFile(path, descriptor, status.st_size)
    finally:
        os.close(descriptor)


def exists(path: Path) -> bool:
    """Tell whether there is anything of that name, a link that leads nowhere included.

    Raises:
        UnreadableModel: a folder on the way may not be looked into.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no name of a file at all
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise _failed(path, error) from error
    return True


def is_folder(path: Path) -> bool:
    """Tell whether it is a folder, or a link to one.

    Raises:
        UnreadableModel: it is not there, or a link that leads nowhere or in a circle.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - `is_dir` answers False where this has a reason to tell
    except OSError as error:
        raise _failed(path, error) from error
    except ValueError as error:
        raise unreadable(path, f"no file name: {error}") from error


class Folder(msgspec.Struct, frozen=True):
    """What one folder holds, by name and sorted; hidden entries are left out."""

    path: str
    files: tuple[str, ...]
    folders: tuple[str, ...]

    def inside(self, *names: str) -> str:
        """Return the path of something in it."""
        return os.path.join(self.path, *names)  # noqa: PTH118 - folders with 100,000 files are listed with plain strings

    def ending(self, suffix: str) -> list[str]:
        """Return the names of its files that end so."""
        return [name for name in self.files if name.endswith(suffix)]


def listing(path: Path) -> Folder:
    """List a folder; a link counts as what it leads to, and as a file when it leads nowhere.

    Raises:
        UnreadableModel: it is no folder, not ours to read, or has more than ENTRIES_LIMIT entries.
    """
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(path) as entries:
            for count, entry in enumerate(entries, 1):
                if count > ENTRIES_LIMIT:
                    raise unreadable(path, f"more than {ENTRIES_LIMIT} entries: not the folder of a model")
                if not entry.name.startswith("."):
                    (folders if _leads_to_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise _failed(path, error) from error
    except ValueError as error:
        raise unreadable(path, f"no file name: {error}") from error
    return Folder(os.fspath(path), tuple(sorted(files)), tuple(sorted(folders)))


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def json_file(path: Path, kind: type[T], *, limit: int = MANIFEST_LIMIT) -> T:
    """Read a small JSON file strictly: typed, UTF-8, no key twice.

    Raises:
        UnreadableModel: it is longer than `limit`, or not of that form.
    """
    return strict_json(path, _small(path, limit), msgspec.json.Decoder(kind))


def strict_json(path: Path, raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode JSON strictly: typed, UTF-8, no key twice in an object.

    Raises:
        UnreadableModel: it is not of that form, or so full of items that it is no header of a model.
    """
    for mark, most in _MARKS_LIMIT.items():
        if raw.count(mark) > most:
            raise unreadable(path, "too many items in its header: not the header of a model")
    try:
        found = decoder.decode(raw)
        json.loads(raw.decode(), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        raise unreadable(path, "not UTF-8") from error
    except RecursionError as error:
        raise unreadable(path, "nested too deeply") from error
    except (msgspec.ValidationError, _TwiceError) as error:
        raise unreadable(path, str(error)) from error
    except ValueError as error:
        raise unreadable(path, f"not JSON: {error}") from error
    return found


def loose_json_file(path: Path, *, limit: int = MANIFEST_LIMIT) -> dict[str, Any]:
    """Read a config as Python writes it (Infinity and NaN included), of which only some keys will be looked at.

    Raises:
        UnreadableModel: it is longer than `limit`, or no JSON object.
    """
    raw = _small(path, limit)
    try:
        found = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise unreadable(path, "not UTF-8") from error
    except RecursionError as error:
        raise unreadable(path, "nested too deeply") from error
    except ValueError as error:
        raise unreadable(path, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise unreadable(path, "not a JSON object")
    return found


def text_file(path: Path, *, limit: int) -> str:
    """Read a short text.

    Raises:
        UnreadableModel: it is longer than `limit`, or not UTF-8.
    """
    try:
        return _small(path, limit).decode()
    except UnicodeDecodeError as error:
        raise unreadable(path, "not UTF-8") from error


class _TwiceError(Exception):
    """A key of a JSON object is there twice."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _TwiceError(f"the key {brief(twice)!r} is there twice")
    return found


def _small(path: Path, limit: int) -> bytes:
    with opened(path) as file:
        if file.size > limit:
            raise unreadable(path, f"{file.size} bytes, where at most {limit} make sense")
        return file.at(0, file.size)


def _failed(path: Path, error: OSError) -> UnreadableModel | ResourceExhausted:
    if is_shortage(error):
        return ResourceExhausted.of(f"cannot read {readable(path)}", error)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return unreadable(path, f"cannot be read: {error.strerror or error}", missing=missing)
