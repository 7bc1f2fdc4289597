"""The file of a picture: whole or not there, and named when it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxsup.cli.failures import CommandFailed
from mlxsup.cli.pictures import PictureFile


def test_a_picture_replaces_what_was_there_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    path.chmod(0o600)
    PictureFile.at(path, "").write(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [child.name for child in tmp_path.iterdir()] == ["x.png"]


def test_a_new_picture_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        PictureFile.at(tmp_path / "x.png", "").write(b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("real.png")
    PictureFile.at(tmp_path / "link.png", "").write(b"new")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        PictureFile.at(fifo, "").write(b"new")
        assert os.read(reader, 10) == b"new"
        assert fifo.is_fifo()
    finally:
        os.close(reader)


def test_a_name_with_slashes_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PictureFile.at(None, "org/model-3").path == Path("org-model-3.png")


def test_a_picture_that_finds_its_folder_gone_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "gone", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    picture = PictureFile.at(folder / "x.png", "")
    folder.rmdir()
    with pytest.raises(CommandFailed, match="cannot be written: No such file") as failed:
        picture.write(b"new")
    (kept,) = elsewhere.iterdir()
    assert (kept.read_bytes(), kept.suffix) == (b"new", ".png")
    assert failed.value.message.endswith(f"; the picture is in {kept}")
    elsewhere.rename(tmp_path / "gone too")
    with pytest.raises(CommandFailed, match="the picture is lost"):
        picture.write(b"new")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, a folder where nobody can make files")
def test_a_folder_that_takes_no_files_is_found_before_any_work() -> None:
    with pytest.raises(CommandFailed, match=r"^/proc/x\.png cannot be written: .*; give another --output$"):
        PictureFile.at(Path("/proc/x.png"), "")


def test_names_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("x" * 300), tmp_path / "loop" / "x.png", Path("~no-such-user/x.png")):
        with pytest.raises(CommandFailed, match="cannot be written"):
            PictureFile.at(path, "")


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    PictureFile.at(path, "").write(b"new")
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
