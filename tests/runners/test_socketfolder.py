"""The private folder of sockets: where it is made, and what becomes of it when somebody tidies it away."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxsup.errors import LoadFailed
from mlxsup.runners.socketfolder import SOCKET_PATH_LIMIT, SocketFolder


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder in which it is made."""
    with tempfile.TemporaryDirectory(prefix="run-") as made:
        monkeypatch.setenv("XDG_RUNTIME_DIR", made)
        yield Path(made)


@pytest.fixture
def folder(base: Path) -> Iterator[SocketFolder]:
    made = SocketFolder()
    assert made.path.parent == base
    yield made
    if made.path.exists():
        made.path.rmdir()


class TestPlace:
    def test_it_is_private_and_short(self, folder: SocketFolder) -> None:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert len(str(folder.path / "1234567890.sock")) <= SOCKET_PATH_LIMIT

    def test_two_have_two(self, folder: SocketFolder) -> None:
        other = SocketFolder()
        assert other.path != folder.path
        other.path.rmdir()

    @pytest.mark.parametrize("odd", ["long", "/nowhere/run", "run", ""])
    def test_a_runtime_folder_that_will_not_do_is_passed_over(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, odd: str
    ) -> None:
        long, relative = tmp_path / ("x" * 100), tmp_path / "run"
        long.mkdir()
        relative.mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(long) if odd == "long" else odd)
        made = SocketFolder()
        assert made.path.parent == Path(tempfile.gettempdir())
        made.path.rmdir()

    def test_a_services_own_runtime_folder_comes_first(self, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
        """The user's goes with the last logout."""
        with tempfile.TemporaryDirectory(prefix="srv-") as own:
            monkeypatch.setenv("RUNTIME_DIRECTORY", f"{own}:/run/other")
            made = SocketFolder()
            assert made.path.parent == Path(own)
            made.path.rmdir()

    def test_no_place_for_temporary_files_matters_only_to_who_needs_it(self, base: Path) -> None:
        """As on a disk that is full, or a root that is read-only: here no file takes a byte."""
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
            "from mlxsup.runners.socketfolder import SocketFolder; print(SocketFolder().path)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert done.stderr == ""
        made = Path(done.stdout.strip())
        assert made.parent == base
        made.rmdir()

    def test_without_any_there_is_a_way_to_mend_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(**_where: object) -> str:
            raise OSError(30, "Read-only file system")

        def nowhere() -> str:
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr(tempfile, "mkdtemp", refused)
        monkeypatch.setattr(tempfile, "gettempdir", nowhere)
        with pytest.raises(LoadFailed, match=r"Read-only file system.*; set TMPDIR"):
            SocketFolder()


class TestRestore:
    def test_while_it_is_there_nothing_happens(self, folder: SocketFolder) -> None:
        (folder.path / "1.sock").touch()
        before = folder.path
        assert not folder.restore()
        assert folder.path == before
        (folder.path / "1.sock").unlink()

    def test_it_is_made_again_where_it_was(self, folder: SocketFolder) -> None:
        before = folder.path
        before.rmdir()
        assert not folder.restore()
        assert folder.path == before
        assert stat.S_IMODE(before.stat().st_mode) == 0o700

    def test_it_is_elsewhere_when_all_around_it_is_gone(self, folder: SocketFolder, base: Path) -> None:
        """As with the last logout of a user."""
        folder.path.rmdir()
        base.rmdir()
        try:
            assert folder.restore()
            assert folder.path.is_dir()
            assert base not in folder.path.parents
        finally:
            base.mkdir()

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_it_is_elsewhere_when_its_name_was_taken(self, folder: SocketFolder, base: Path, kind: str) -> None:
        taken = folder.path
        taken.rmdir()
        if kind == "file":
            taken.touch()
        else:
            taken.symlink_to(base)
        assert folder.restore()
        assert folder.path.is_dir()
        assert folder.path != taken
        taken.unlink()

    @pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
    def test_it_is_elsewhere_when_it_is_another_users(self, folder: SocketFolder) -> None:
        taken = folder.path
        os.chown(taken, 12345, -1)
        assert folder.restore()
        assert folder.path != taken
        taken.rmdir()
