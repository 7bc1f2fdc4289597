"""A runner that makes much of little: it answers a completion with as many bytes as are asked for, at hardly any cost.

    python source.py --port N

The prompt says what: `chunks COUNT PAUSE` for lines of 60 bytes, each in a chunk of its own, PAUSE seconds apart (0: as fast
as they are taken); `picture BYTES` for one line with so much base64. It is run by its path, as any runner.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import cast

import uvloop


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNK = chunk(b'{"content":"' + b"x" * 45 + b'"}\n')
LAST = chunk(b'{"done":true,"stop_reason":"stop"}\n') + b"0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
HEALTH = b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + b'{"status":"ok"}'
BURST = 16
"""Chunks written at a time where there is no pause."""
PIECE = 1 << 20

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class Exchange(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.held = b""
        self.room = asyncio.Event()
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # of uvloop, which are no subclasses
        self.room.set()

    def data_received(self, data: bytes) -> None:
        self.held += data
        head, found, body = self.held.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or len(body) < int(length[1] if length else 0):
            return
        self.held = b""
        if head.startswith(b"GET"):
            self.transport.write(HEALTH)
            return
        what, *numbers = json.loads(body)["prompt"].split()
        self.transport.write(HEAD)
        if what == "picture":
            self.work = asyncio.create_task(self.picture(int(numbers[0])))
        elif float(numbers[1]):
            self.pace(int(numbers[0]), float(numbers[1]), asyncio.get_running_loop().time())
        else:
            self.work = asyncio.create_task(self.burst(int(numbers[0])))

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.work is not None:
            self.work.cancel()

    def pace(self, left: int, pause: float, due: float) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(CHUNK if left else LAST)
        if left:
            asyncio.get_running_loop().call_at(due + pause, self.pace, left - 1, pause, due + pause)

    async def burst(self, count: int) -> None:
        for _ in range(count // BURST):
            await self.room.wait()
            self.transport.write(CHUNK * BURST)
        self.transport.write(LAST)

    async def picture(self, size: int) -> None:
        piece = chunk(b"A" * PIECE)
        self.transport.write(chunk(b'{"step":0,"total":1}\n{"image":"'))
        for _ in range(size // PIECE):
            await self.room.wait()
            self.transport.write(piece)
        self.transport.write(chunk(b'","done":true}\n') + b"0\r\n\r\n")


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Exchange, "127.0.0.1", int(sys.argv[2]), reuse_port=True, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
