"""The cheap look at an idle runner: anything that answers HTTP counts, and no server is left in the middle of its answer."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from mlxsup import Settings
from mlxsup.config import parse
from mlxsup.engines import ENGINES, KEYS, Address
from mlxsup.runners.probe import Probe, open_session

pytestmark = pytest.mark.anyio

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _settings(health: str) -> Settings:
    model = {"engine": "command", "command": ["true"], "memory": "1MiB", "health": health}
    return parse({"models": {"m": model}}, KEYS)


@asynccontextmanager
async def _probe(talk: Talk, health: str = "/health") -> AsyncIterator[Probe]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if health != "none":
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /health HTTP/1.1\r\n")
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = Address(port=server.sockets[0].getsockname()[1])
    async with open_session(address, 1.0) as session:
        yield Probe(_settings(health).models["m"], ENGINES["command"], address, session)
    server.close()
    await server.wait_closed()


async def _until_left(reader: asyncio.StreamReader) -> None:
    await reader.read()


@pytest.mark.parametrize("status", ["200 OK", "503 Loading", "404 Not Found"])
async def test_any_status_is_an_answer_and_its_length_ends_it(status: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 5\r\nConnection: keep-alive\r\n\r\n".encode())
        await asyncio.sleep(0.05)
        writer.write(b"hello")
        await _until_left(reader)

    async with _probe(talk) as probe:
        began = time.monotonic()
        assert await probe.is_answered(15.0)
        assert time.monotonic() - began < 10.0


async def test_an_answer_without_a_length_is_read_to_its_end() -> None:
    whole: list[bool] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nfirst")
        await asyncio.sleep(0.05)
        writer.write(b"last")
        await writer.drain()
        whole.append(not reader.at_eof())

    async with _probe(talk) as probe:
        assert await probe.is_answered(15.0)
    assert whole == [True]


async def test_a_server_that_never_ends_its_answer_has_answered() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await _until_left(reader)

    async with _probe(talk) as probe:
        assert await probe.is_answered(0.2)


async def test_silence_and_another_protocol_are_no_answer() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await _until_left(reader)

    async def other(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")

    async with _probe(silent) as probe:
        assert not await probe.is_answered(0.2)
    async with _probe(other) as probe:
        assert not await probe.is_answered(15.0)


async def test_an_answer_that_came_in_time_counts_though_the_program_kept_its_loop_to_itself() -> None:
    """By then the time is up and the answer is there, at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = threading.Event()

        def serve() -> None:
            line, _ = listener.accept()
            with line:
                line.recv(1024)
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                said.set()
                line.recv(1024)

        serving = threading.Thread(target=serve)
        serving.start()
        address = Address(port=listener.getsockname()[1])
        async with open_session(address, 1.0) as session:
            probe = Probe(_settings("/health").models["m"], ENGINES["command"], address, session)
            asking = asyncio.create_task(probe.is_answered(0.1))
            await asyncio.sleep(0)  # the question is out
            said.wait(10)
            time.sleep(0.2)  # noqa: ASYNC251 - this is what the program does
            assert await asking
        serving.join()


async def test_nobody_listens() -> None:
    async with _probe(_nobody) as probe:
        pass
    assert not await probe.is_answered(15.0)


async def test_without_a_health_path_an_open_door_is_an_answer() -> None:
    async with _probe(_nobody, health="none") as probe:
        assert await probe.is_answered(15.0)


@pytest.mark.parametrize("health", ["none", "/health"])
async def test_a_connection_to_itself_is_no_answer(health: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may choose for us the very port that nobody listens on yet, and then connects us to ourselves."""
    async with _probe(_nobody, health="none") as probe:
        assert await probe.ask(15.0) is not None
        address = probe._address
    made = []

    def line(_: Probe) -> socket.socket:
        bound = socket.socket()
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address.host, address.port))
        made.append(bound)
        return bound

    monkeypatch.setattr(Probe, "_line", line)
    async with open_session(address, 1.0) as session:
        probe = Probe(_settings(health).models["m"], ENGINES["command"], address, session)
        if health == "none":
            assert await probe.ask(15.0) is None
            assert (probe.reached, probe.silence) == (False, "nothing answers yet")
        assert await probe.is_answered(0.5) is False
    assert made


async def _nobody(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    return
