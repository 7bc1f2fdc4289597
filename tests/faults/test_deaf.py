"""A runner that takes no more connections: who asks it for something is told so, soon."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from mlxsup.errors import BadAnswer
from mlxsup.runners.connecting import connect

from .house import collect, report, supervisor

CODE = """
import signal, socket, sys
where = sys.argv[1]
line = socket.socket(socket.AF_INET if where.isdigit() else socket.AF_UNIX)
if where.isdigit():
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
line.bind(("127.0.0.1", int(where)) if where.isdigit() else where)
line.listen(1)
asked, _ = line.accept()
asked.recv(65536)
asked.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\n{}")
asked.close()
signal.pause()
"""
"""Answers one health request, and then nothing more."""


def entry(place: str, **keys: Any) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", "-c", CODE, place]
    return {"engine": "command", "memory": "1MiB", "command": command, "stop_grace": "1s", **keys}


def fill(held: ExitStack, address: str | tuple[str, int]) -> None:
    """Connect until nobody can any more: what waits to be accepted is as much as may wait."""
    while True:
        line = held.enter_context(socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET))
        line.settimeout(0.3)
        try:
            line.connect(address)
        except (TimeoutError, BlockingIOError):
            return


def where(text: str) -> str | tuple[str, int]:
    """The address in a report, as sockets take it."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    return host, int(port)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one more than may wait is refused, not kept waiting")
@pytest.mark.parametrize("place", ["{port}", "{socket}"])
async def test_who_is_not_let_in_is_told_so_after_the_connect_timeout(place: str) -> None:
    async with supervisor(m=entry(place, connect_timeout="0.5s", probe_interval="1h")) as sup:
        await sup.load("m")
        with ExitStack() as held:
            await asyncio.to_thread(fill, held, where(report(sup).address))
            began = time.monotonic()
            with pytest.raises(BadAnswer, match="lives, but it took no connection") as caught:
                await collect(sup)
            assert 0.5 <= time.monotonic() - began < 5.0
        assert (caught.value.status, caught.value.source) == (502, "runner")
        assert report(sup).leases == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one more than may wait is refused, not kept waiting")
async def test_who_comes_when_many_wait_is_let_in_in_turn() -> None:
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as held:
        path = str(Path(held.enter_context(TemporaryDirectory())) / "s")
        listener.bind(path)
        listener.listen(1)
        await asyncio.to_thread(fill, held, path)
        late = asyncio.create_task(connect(path))
        done, _ = await asyncio.wait({late}, timeout=0.1)
        assert not done
        while not late.done():
            with suppress(BlockingIOError):
                listener.setblocking(False)
                held.enter_context(listener.accept()[0])
            await asyncio.sleep(0.005)
        held.enter_context(await late).sendall(b"x")
        with pytest.raises(FileNotFoundError):
            await connect(f"{path}-nobody")
