"""Files that fail or change while they are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlxsup.weights import UnreadableModel
from mlxsup.weights.reading import is_folder, listing, opened

from .complaints import complaint
from .making import safetensors, write


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m", b"0123456789")
    with opened(path) as file:
        assert file.at(2, 3) == b"234"
        path.write_bytes(b"0123")
        with pytest.raises(UnreadableModel, match="became shorter than 10 bytes"):
            file.at(0, 10)


def test_reads_that_come_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: pread(descriptor, min(count, 3), offset))
    with opened(write(tmp_path / "m", b"0123456789")) as file:
        assert file.at(1, 8) == b"12345678"


def test_a_disk_that_fails_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.safetensors", safetensors({"w": ("BF16", [8])}))

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    assert complaint(path) == "cannot be read: Input/output error"


def test_names_no_file_can_have_are_an_error(tmp_path: Path) -> None:
    name = f"{tmp_path}/a\0b"
    for look in (lambda: opened(name).__enter__(), lambda: is_folder(name), lambda: listing(name)):
        with pytest.raises(UnreadableModel, match="no file name"):
            look()
