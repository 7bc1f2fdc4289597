"""Asking one runner how it is: the HTTP session of a runner, and one look at its health path."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import ExitStack, suppress

import aiohttp

from mlxsup.config import ModelSettings
from mlxsup.engines import Address, Engine, Finding, Verdict
from mlxsup.protocol import RunnerMemory
from mlxsup.runners.connecting import UnixConnector
from mlxsup.runners.reading import read_in_pieces
from mlxsup.shortages import describe_shortage, is_shortage

MAX_BODY = 64 * 1024
READ_AHEAD = 16 * 1024
"""Bytes of an answer that wait for a slow client before the runner is slowed down: twice this, and what one read brings."""
_LENGTH = re.compile(rb"^content-length: *(\d{1,9})\r?$", re.IGNORECASE | re.MULTILINE)


class Probe:
    """Looks at a runner's health path, or, for runners without one, at whether their address answers."""

    def __init__(self, model: ModelSettings, engine: Engine, address: Address, session: aiohttp.ClientSession) -> None:
        self._path = model.health or engine.default_health
        self._engine = engine
        self._address = address
        self._where: str | tuple[str, int] = address.socket or (address.host, address.port)
        self._session = session
        host = "localhost" if address.socket else f"{address.host}:{address.port}"
        self._question = (
            f"GET {self._path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()
        )
        self.silence = ""
        self.reached = False
        """Whether anybody took the connection of the last `ask`, whatever came of it."""
        self._heard = b""
        self._memory: RunnerMemory | None = None

    @property
    def memory(self) -> RunnerMemory | None:
        """What the runner said of its own memory in its last answer, if it says such things."""
        if self._heard:
            self._memory = self._engine.read_memory(self._heard.partition(b"\r\n\r\n")[2])
            self._heard = b""
        return self._memory

    async def ask(self, limit: float) -> Finding | None:
        """Return what the engine reads out of the answer; None when none came within `limit` seconds, `silence` says how."""
        self.reached = True
        try:
            async with asyncio.timeout(limit):
                return await (self._knock() if self._path == "none" else self._get())
        except TimeoutError:
            self.silence = f"{self._path} did not answer within {limit:g} s"
        except (aiohttp.ClientError, OSError) as error:
            self.reached = isinstance(error, aiohttp.ClientError) and not isinstance(
                error, aiohttp.ClientConnectorError
            )
            self.silence = describe_shortage(error) if is_shortage(error) else "nothing answers yet"
        return None

    async def is_answered(self, limit: float) -> bool | None:
        """Tell whether anything answers within `limit` seconds, whatever it says: for runners that idle, for months.

        None when nobody could be asked, because we ourselves are out of descriptors or memory.
        Unlike `ask` it does not parse, which would cost several times as much. The answer is read to its end all the same: a server whose client has
        left in the middle may write a traceback about it.
        """
        heard = bytearray()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        try:
            with ExitStack() as lines:
                line = lines.enter_context(self._line())
                if self._path == "none" or not self._ask_at_once(line):
                    line.close()  # or a server that serves one after the other would wait for its question
                    line = lines.enter_context(self._line())
                    async with asyncio.timeout_at(deadline):
                        await self._reach(line)
                        if self._path == "none":
                            return True
                        await loop.sock_sendall(line, self._question)
                await _hear(line, heard, deadline)
        except OSError as error:  # a TimeoutError is one, too
            if is_shortage(error):
                return None
        self._heard = bytes(heard)
        return heard.startswith(b"HTTP/")

    def _line(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX if self._address.socket else socket.AF_INET)
        line.setblocking(False)
        return line

    def _ask_at_once(self, line: socket.socket) -> bool:
        """Ask without waiting for the connection, which on one machine is there by then; tells whether that went well.

        It saves the loop a turn, which is half of what a probe costs.
        """
        try:
            with suppress(BlockingIOError):
                line.connect(self._where)
            return line.send(self._question) == len(self._question)
        except OSError as error:
            if is_shortage(error):
                raise
            return False

    async def _get(self) -> Finding:
        async with self._session.get(self._address.base_url + self._path, allow_redirects=False) as answer:
            body = await answer.content.read(MAX_BODY)
            return self._engine.read_health(answer.status, body)

    async def _knock(self) -> Finding:
        with self._line() as line:
            await self._reach(line)
        return Finding(Verdict.READY)

    async def _reach(self, line: socket.socket) -> None:
        """Connect, but not to itself: TCP does so when nobody listens and the system happens to choose the same port for us."""
        await asyncio.get_running_loop().sock_connect(line, self._where)
        if not self._address.socket and line.getsockname() == self._where:
            raise ConnectionRefusedError


async def _hear(line: socket.socket, heard: bytearray, deadline: float) -> None:
    """Take an answer, as far as it has come by the deadline of the loop's clock.

    What has come counts even if it is past that: a program that keeps its loop to itself for seconds sees both at once, and
    the runner was in time.
    """
    loop = asyncio.get_running_loop()
    late = False
    while not _whole(heard):
        try:
            part = line.recv(MAX_BODY)
        except BlockingIOError:
            if late:
                return
            late = not await _becomes_readable(line, deadline - loop.time())
            continue
        if not part:
            return
        heard += part


async def _becomes_readable(line: socket.socket, limit: float) -> bool:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(line, _note, readable)
    try:
        done, _ = await asyncio.wait({readable}, timeout=max(0.0, limit))
    finally:
        loop.remove_reader(line)
    return bool(done)


def _note(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _whole(answer: bytes | bytearray) -> bool:
    """Tell whether nothing more needs to be read; an answer that does not say how long it is ends with its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return len(answer) >= MAX_BODY or (length is not None and len(body) >= int(length[1]))


def open_session(address: Address, connect_timeout: float) -> aiohttp.ClientSession:
    """Return the one HTTP session of a runner: fresh connections, no limits of number or time but the connect's.

    A kept connection that the runner has just closed would fail a request that never reached it; a new one on loopback
    costs a fraction of a millisecond.
    """
    connector: aiohttp.BaseConnector = (
        UnixConnector(address.socket, limit=0, force_close=True)
        if address.socket
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    read_in_pieces(connector)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),  # what it sets for one caller is no other's
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        trust_env=False,
        read_bufsize=READ_AHEAD,
    )
