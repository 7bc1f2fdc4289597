"""A pipe's descriptor is closed once, whatever the loop does: its number may be another thread's by the second time."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from mlxsup.runners.pipes import connect_reader

pytestmark = pytest.mark.anyio


class _Told(asyncio.Protocol):
    def __init__(self) -> None:
        self.heard = b""
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, _: Exception | None) -> None:
        self.lost.set()


async def test_it_hears_what_is_written_and_its_end() -> None:
    reader, writer = os.pipe()
    transport, told = await connect_reader(_Told, reader)
    os.write(writer, b"hello")
    os.close(writer)
    async with asyncio.timeout(10):
        await told.lost.wait()
    transport.close()
    assert told.heard == b"hello"
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        os.fstat(reader)
    assert caught.value.errno == errno.EBADF


async def test_who_closes_the_descriptor_is_one_alone() -> None:
    """The loop of uvloop does it itself, then closes the file object; that of asyncio leaves it to the file object."""
    reader, writer = os.pipe()
    transport, told = await connect_reader(_Told, reader)
    file = transport.get_extra_info("pipe")
    assert file.closefd == (not type(asyncio.get_running_loop()).__module__.startswith("uvloop"))
    transport.close()
    async with asyncio.timeout(10):
        await told.lost.wait()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    os.close(writer)
