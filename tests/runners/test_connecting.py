"""Connecting to a unix socket on a system that refuses whoever does not find room, as macOS does."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import pytest

from mlxsup.runners import connecting
from mlxsup.runners.connecting import UnixConnector, connect
from tests.waiting import LIMIT

pytestmark = pytest.mark.anyio

AS_ON_A_MAC = (BlockingIOError, ConnectionRefusedError)


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a socket may be; a socket that is bound and does not listen refuses everywhere."""
    with TemporaryDirectory() as folder:
        yield Path(folder) / "s"


async def test_who_is_refused_there_is_let_in_in_turn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "_FULL", AS_ON_A_MAC)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        late = asyncio.create_task(connect(str(path)))
        done, _ = await asyncio.wait({late}, timeout=0.1)
        assert not done
        listener.listen()
        async with asyncio.timeout(LIMIT):
            (await late).close()


async def test_who_is_refused_all_the_time_is_told_so_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "_FULL", AS_ON_A_MAC)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        limit = aiohttp.ClientTimeout(total=None, sock_connect=0.1)
        async with (
            aiohttp.ClientSession(connector=UnixConnector(str(path)), timeout=limit) as session,
            asyncio.timeout(LIMIT),
        ):
            with pytest.raises(aiohttp.ServerTimeoutError):
                await session.get("http://localhost/")


@pytest.mark.skipif(sys.platform == "darwin", reason="a refusal says nothing there")
async def test_elsewhere_a_refusal_is_one(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with pytest.raises(ConnectionRefusedError):
            await connect(str(path))
