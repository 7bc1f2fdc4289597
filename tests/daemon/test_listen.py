"""A unix socket of a daemon that lives is never removed, though it may take nobody just now."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlxsup.daemon import listen
from mlxsup.daemon.listen import listening
from mlxsup.errors import ConfigError, Conflict

pytestmark = pytest.mark.anyio


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one more than may wait is refused")
async def test_one_that_has_as_many_waiting_as_may_wait_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ExitStack() as held:
        full = held.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(path))
        full.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                client = held.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        inode = path.stat().st_ino
        with pytest.raises(Conflict, match="is taken by another program"):
            async with listening([f"unix:{path}"]):
                pass
        assert path.stat().st_ino == inode


async def test_where_a_full_one_is_refused_a_lock_tells_who_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has shut its door refuses everywhere, as a full one does on a Mac."""
    monkeypatch.setattr(listen, "_REFUSES_WHEN_FULL", True)
    path, aside = tmp_path / "s", tmp_path / "aside"
    async with listening([f"unix:{path}"]) as (live,):
        live.shutdown(socket.SHUT_RD)
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        inode = path.stat().st_ino
        with pytest.raises(Conflict):
            async with listening([f"unix:{path}"]):
                pass
        assert path.stat().st_ino == inode
        aside.hardlink_to(path)
    assert not path.exists()
    aside.rename(path)  # as one that was killed leaves it
    async with listening([f"unix:{path}"]):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


async def test_a_lock_that_is_a_link_elsewhere_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_REFUSES_WHEN_FULL", True)
    path = tmp_path / "s"
    Path(f"{path}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        async with listening([f"unix:{path}"]):
            pass
    assert not (tmp_path / "elsewhere").exists()
