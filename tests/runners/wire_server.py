"""The far side of the wire, byte for byte: a raw server that writes what a test says, and a session to it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from mlxsup.engines import Address
from mlxsup.errors import BadAnswer, MlxsupError
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.runners.liveness import Pulse
from mlxsup.runners.probe import open_session
from mlxsup.runners.relay import Answer, Limits, post_completion

OPENING = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
UNTIL_CLOSED = OPENING + b"Connection: close\r\n\r\n"
CHUNKED = OPENING + b"Transfer-Encoding: chunked\r\n\r\n"
WIDE = Limits(first_chunk=15, silence=15)
"""Limits that only a hanging test meets."""

LAST_WORDS = ["its last words"]


class Exchange:
    """One request as the server sees it, and the connection to answer on."""

    def __init__(self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body; an empty one ends it."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self) -> None:
        """Break off without any farewell."""
        self._writer.transport.abort()

    async def client_left(self) -> None:
        """Return when the other side has closed."""
        try:
            while await self._reader.read(1024):
                pass
        except ConnectionError:
            return


Answering = Callable[[Exchange], Awaitable[None]]


class Wire:
    """A client's view of the raw server, and the witness who is asked when it misbehaves.

    `blamed` holds what broken answers were blamed on.
    """

    def __init__(self, address: Address, session: aiohttp.ClientSession) -> None:
        self.address = address
        self.session = session
        self.pulse = Pulse()
        self.blamed: list[str] = []

    async def blame(self, what: str) -> MlxsupError:
        self.blamed.append(what)
        return self.testify(BadAnswer(f"the runner lives, but {what}"))

    def testify(self, error: MlxsupError) -> MlxsupError:
        error.details["last_words"] = LAST_WORDS
        return error

    async def post(self, request: CompletionRequest | None = None, limits: Limits = WIDE) -> Answer:
        asked = request or CompletionRequest(prompt="p")
        return await post_completion(self.session, f"{self.address.base_url}/completion", asked, limits, self)


@asynccontextmanager
async def serving(answer: Answering, *, unix: bool = True) -> AsyncIterator[Address]:
    """Serve every connection with `answer`; a connection that it leaves open is closed behind it."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.lower().splitlines() if line[:15] == b"content-length:"), 0)
            await answer(Exchange(head, await reader.readexactly(length), reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        if unix:
            address = Address(socket=str(Path(folder) / "s"))
            server = await asyncio.start_unix_server(connected, address.socket)
        else:
            server = await asyncio.start_server(connected, "127.0.0.1", 0)
            address = Address(port=server.sockets[0].getsockname()[1])
        try:
            yield address
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.wait_closed()


@asynccontextmanager
async def wire(answer: Answering, *, unix: bool = True, connect_timeout: float = 15) -> AsyncIterator[Wire]:
    """A raw server and the session with which the supervisor would speak to it."""
    async with serving(answer, unix=unix) as address:
        async with open_session(address, connect_timeout) as session:
            yield Wire(address, session)
        await asyncio.sleep(0)  # the session's transports close in the loop's next turn


def saying(*pieces: bytes) -> Answering:
    """Write these bytes and close."""

    async def answer(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)

    return answer


async def read_all(answer: Answer) -> list[CompletionChunk]:
    """All chunks up to the one with `done`."""
    chunks = [await answer.next_chunk()]
    while not chunks[-1].done:
        chunks.append(await answer.next_chunk())
    return chunks
