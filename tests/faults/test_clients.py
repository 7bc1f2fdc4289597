"""Clients that dawdle: they do not finish their request, or do not take their answer; nobody else notices, and they are left."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import stat
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.api import bodies, create_app, serving
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, collect, promised, report, words

pytestmark = pytest.mark.anyio

BODY = b'{"model": "m", "prompt": "p"}'
LONG = "; ".join(f"big@{number}=1" for number in range(1, 60))
"""Some 60 MB of answer: more than all the buffers of two sockets."""


@dataclass
class Api:
    sup: Supervisor
    http: aiohttp.ClientSession
    port: int

    async def connect(self, *, small: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; a small one has hardly any room for an answer."""
        line = socket.socket()
        if small:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        line.setblocking(False)
        await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=line, limit=4096)

    async def ask(self) -> float:
        """How long the API takes for a small question."""
        began = time.monotonic()
        async with self.http.get("/version") as answer:
            assert answer.status == 200
            await answer.read()
        return time.monotonic() - began


@asynccontextmanager
async def api(models: dict[str, dict[str, Any]], **server: Any) -> AsyncIterator[Api]:
    """The API as the daemon serves it; keyword arguments are keys of `[server]`."""
    entries = {name: {"stop_grace": "2s", **entry} for name, entry in models.items()}
    settings = parse({"server": server, "models": entries}, KEYS)
    async with Supervisor(settings) as sup:
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            port = listener.getsockname()[1]
            timeout = aiohttp.ClientTimeout(total=LIMIT)
            async with (
                serving(create_app(sup), [listener], settings.server, last_bytes=1.0),
                aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http,
            ):
                yield Api(sup, http, port)


def sockets() -> int:
    """How many this process has open."""
    found = 0
    for path in Path("/dev/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder is closed again
            found += stat.S_ISSOCK(os.fstat(int(path.name)).st_mode)
    return found


def request(body: bytes = BODY, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (size, body)


async def closed(reader: asyncio.StreamReader, limit: float = LIMIT) -> bytes:
    """Read until the other side closes; return what came."""
    text = b""
    with anyio.fail_after(limit), suppress(ConnectionError):
        while part := await reader.read(65536):
            text += part
    return text


# Answers that are not taken


async def test_a_client_that_stops_reading_is_left_and_its_work_aborted_while_others_go_on(tmp_path: Path) -> None:
    record = Record(tmp_path)
    models = {"m": fake_runner(f"record={record.path}; tokens=99; {LONG}"), "quick": fake_runner("tokens=20")}
    async with api(models, write_timeout="1s") as it:
        await it.sup.load("m")
        await it.sup.load("quick")
        _, writer = await it.connect(small=True)
        began = time.monotonic()
        writer.write(request())
        await until(lambda: report(it.sup).leases == 1)
        slowest = 0.0
        while report(it.sup).leases:
            before = time.monotonic()
            async with it.http.post("/completion", json={"model": "quick", "prompt": "p"}) as answer:
                assert len((await answer.read()).splitlines()) == 21
            slowest = max(slowest, time.monotonic() - before)
            assert time.monotonic() - began < LIMIT
        assert time.monotonic() - began >= 1.0
        assert slowest < 2.0
        await until(lambda: "gone 1" in record.lines())
        assert "done 1" not in record.lines()
        writer.transport.abort()


@pytest.mark.skipif("sys.platform != 'linux'", reason="elsewhere the system does not tell what its own buffers hold")
async def test_a_client_that_reads_slowly_is_served() -> None:
    """So slowly that, for all that a program sees of its buffers, nothing moves for several times its timeout."""
    async with api({"m": fake_runner(f"tokens=99; {LONG}")}, write_timeout="1s") as it:
        reader, writer = await it.connect(small=True)
        writer.write(request())
        await until(lambda: report(it.sup).leases == 1)
        began = time.monotonic()
        while time.monotonic() - began < 4.0:
            with anyio.fail_after(LIMIT):
                assert await reader.read(4096)
            await anyio.sleep(0.05)
        assert report(it.sup).leases == 1
        writer.transport.abort()
        await until(lambda: report(it.sup).leases == 0)


async def test_a_finished_answer_that_nobody_reads_does_not_keep_its_connection_for_ever(tmp_path: Path) -> None:
    """The work is done and the place free, only bytes are left: they are dropped with their connection."""
    record = Record(tmp_path)
    async with api({"m": fake_runner(f"record={record.path}; steps=1; image=7000000")}, write_timeout="0.5s") as it:
        await it.sup.load("m")
        before = sockets()
        _, writer = await it.connect(small=True)
        writer.write(request().replace(b"HTTP/1.1", b"HTTP/1.0"))
        await until(lambda: "request 1" in " ".join(record.lines()))
        await until(lambda: report(it.sup).leases == 0)
        await until(lambda: sockets() <= before + 1)  # our end
        writer.transport.abort()


@pytest.mark.parametrize("address", ["unix", "tcp"])
async def test_a_slow_reader_costs_little_memory(address: Literal["unix", "tcp"]) -> None:
    streams = 12
    runner = fake_runner(f"tokens=99; {LONG}", address=address, concurrency=streams + 1)
    async with api({"m": runner}, write_timeout="30s") as it:
        await it.sup.load("m")
        lines = [await it.connect(small=True) for _ in range(streams)]
        tracemalloc.start()
        try:
            for _, writer in lines:
                writer.write(request())
            await until(lambda: report(it.sup).leases == streams)
            await anyio.sleep(2.0)  # time to fill all there is
            each = tracemalloc.get_traced_memory()[0] / streams
        finally:
            tracemalloc.stop()
            for _, writer in lines:
                writer.transport.abort()
        print(f"a slow reader costs {each / 1024:.0f} KiB")  # noqa: T201
        assert each < 256 * 1024  # the test's own ends of the connections are in it


async def test_a_client_that_stops_reading_keeps_no_runner_from_being_unloaded() -> None:
    """It is left after the write timeout, long before the end of the drain, and those that read get all of theirs."""
    models = {"m": fake_runner(f"tokens=99; {LONG}", concurrency=2, drain_timeout="60s")}
    async with api(models, write_timeout="1s") as it:
        await it.sup.load("m")
        _, writer = await it.connect(small=True)
        writer.write(request())
        await until(lambda: report(it.sup).leases == 1)
        async with it.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
            began = time.monotonic()
            unload = asyncio.create_task(it.sup.unload("m"))
            await until(lambda: report(it.sup).state == "draining")
            assert len((await answer.read()).splitlines()) == 99 + 59 + 1
        async with asyncio.timeout(LIMIT):
            await unload
        assert 0.9 <= time.monotonic() - began < LIMIT
        assert report(it.sup).state == "stopped"
        writer.transport.abort()


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_client_that_leaves_the_queue_is_gone_at_once(how: str) -> None:
    async with Gate() as gate, api({"m": fake_runner(f"gate@1#1={gate.path}", concurrency=1)}) as it:
        work = asyncio.create_task(collect(it.sup))
        arrival = await gate.arrival()

        async def attempt() -> float:
            _, writer = await it.connect()
            writer.write(request())
            await until(lambda: report(it.sup).queue == 1)
            began = time.monotonic()
            if how == "closed":
                writer.close()
            else:
                writer.transport.abort()
            await until(lambda: report(it.sup).queue == 0)
            return time.monotonic() - began

        await promised(0.1, attempt)
        arrival.go()
        assert words(await work) == "t1 t2 t3 "


async def test_who_does_not_read_cannot_keep_the_program_from_ending() -> None:
    before = sockets()
    async with api({"m": fake_runner(f"tokens=99; {LONG}")}, write_timeout="10m") as it:
        _, writer = await it.connect(small=True)
        writer.write(request())
        await until(lambda: report(it.sup).leases == 1)
        await anyio.sleep(0.5)  # time to fill all there is
        began = time.monotonic()
    assert time.monotonic() - began < LIMIT
    await until(lambda: sockets() <= before + 1)  # our end
    writer.transport.abort()


# Requests that do not end


@pytest.mark.parametrize("begun", [b"", b"G", b"GET /version HTTP/1.1\r\nHost: localhost\r\n"])
async def test_half_open_requests_hold_up_nobody_and_are_left(begun: bytes) -> None:
    async with api({"m": fake_runner()}, header_timeout="2s") as it:
        await it.ask()
        before = sockets()
        opened = time.monotonic()
        lines = [await it.connect() for _ in range(150)]
        for _, writer in lines:
            writer.write(begun)
        await promised(0.05, it.ask, tries=20)
        async with asyncio.TaskGroup() as tasks:
            left = [tasks.create_task(closed(reader)) for reader, _ in lines]
        assert {task.result() for task in left} == {b""}
        assert time.monotonic() - opened >= 2.0
        for _, writer in lines:
            writer.close()
        await until(lambda: sockets() <= before)


async def test_half_open_requests_hold_up_no_runner_in_any_state() -> None:
    async with Gate() as gate:
        entry = fake_runner(f"gate@1={gate.path}; gate@sigterm={gate.path}; tokens=50", stop_grace="30s")
        models = {"streams": entry, "drains": entry, "stops": entry}
        async with api(models, header_timeout="2s") as it:
            work = [asyncio.create_task(collect(it.sup, model)) for model in ("streams", "drains")]
            stands = [await gate.arrival("1") for _ in work]
            await it.sup.load("stops")
            unloads = [asyncio.create_task(it.sup.unload(model)) for model in ("drains", "stops")]
            last = await gate.arrival("sigterm")
            lines = [await it.connect() for _ in range(150)]
            for _, writer in lines:
                writer.write(b"POST /completion HTTP/1.1\r\nHost: localhost\r\n")
            await promised(0.05, it.ask, tries=20)
            assert {report(it.sup, model).state for model in models} == {"ready", "draining", "stopping"}
            gate.open()
            for arrival in (*stands, last):
                arrival.go()
            async with asyncio.timeout(LIMIT):
                assert [len(await each) for each in work] == [51, 51]
                await asyncio.gather(*unloads)
                left = await asyncio.gather(*(closed(reader) for reader, _ in lines))
            assert {*left} == {b""}
            for _, writer in lines:
                writer.close()


async def test_a_head_that_drips_is_given_no_more_time() -> None:
    async with api({"m": fake_runner()}, header_timeout="1s") as it:
        reader, writer = await it.connect()
        began = time.monotonic()
        task = asyncio.create_task(closed(reader))
        writer.write(b"GET /version HTTP/1.1\r\nX: ")
        while not task.done():
            writer.write(b"x")
            await anyio.sleep(0.05)
        assert await task == b""
        assert 1.0 <= time.monotonic() - began < 5.0
        writer.close()


async def test_a_kept_connection_may_idle_but_not_begin_a_request_and_stop() -> None:
    whole = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with api({"m": fake_runner()}, header_timeout="1s") as it:
        reader, writer = await it.connect()
        for _ in range(2):
            writer.write(whole)
            with anyio.fail_after(LIMIT):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
            await anyio.sleep(1.3)
        writer.write(whole[:-1])
        began = time.monotonic()
        assert await closed(reader) == b""
        assert 0.9 <= time.monotonic() - began < 5.0
        writer.close()


async def test_a_head_in_pieces_is_a_head(tmp_path: Path) -> None:
    async with api({"m": fake_runner("tokens=1")}, header_timeout="5s") as it:
        reader, writer = await it.connect()
        for byte in request():
            writer.write(bytes([byte]))
            await anyio.sleep(0.001)
        with anyio.fail_after(LIMIT):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b'"done"')
        writer.close()


async def test_a_long_answer_is_not_taken_for_a_late_request() -> None:
    models = {"m": fake_runner("tokens=6; delay=0.3")}
    async with (
        api(models, header_timeout="0.5s", write_timeout="0.5s") as it,
        it.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer,
    ):
        assert b'"done"' in (await answer.read()).splitlines()[-1]


@pytest.mark.parametrize("path", ["/completion", "/models/load", "/embedding"])
async def test_a_body_that_does_not_end_is_refused_and_its_connection_closed(path: str) -> None:
    async with api({"m": fake_runner()}, header_timeout="2s") as it:
        lines = [await it.connect() for _ in range(50)]
        for _, writer in lines:
            writer.write(request(BODY[:9], length=len(BODY)).replace(b"/completion", path.encode()))
        assert await it.ask() < 2
        for reader, writer in lines:
            head, _, body = (await closed(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            error = json.loads(body)["error"]
            assert (error["code"], error["status"]) == ("request_timeout", 408)
            assert "9 bytes" in error["message"]
            writer.close()
        assert report(it.sup).state == "stopped"


async def test_a_body_that_drips_for_ever_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_SLOWEST", 1000)
    async with api({"m": fake_runner()}, header_timeout="1s") as it:
        reader, writer = await it.connect()
        writer.write(request(b"", length=1 << 20))
        task = asyncio.create_task(closed(reader))
        began = time.monotonic()
        while not task.done():
            writer.write(b" ")
            await anyio.sleep(0.05)
        assert (await task).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 8.0
        writer.close()


# Bytes that are no HTTP


@pytest.mark.parametrize(
    "told",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody tries TLS
        b"SSH-2.0-OpenSSH_9.7\r\n",
        b"GET /version HTTP/9.9.9\r\n\r\n",
        b"GET /version HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /version HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /version HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
    ],
    ids=["TLS", "SSH", "version", "header", "length", "long", "NUL"],
)
async def test_what_is_no_http_gets_an_error_like_every_other(told: bytes) -> None:
    async with api({"m": fake_runner()}) as it:
        reader, writer = await it.connect()
        writer.write(told)
        writer.write(b"\r\n\r\n")
        head, _, body = (await closed(reader)).partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        assert status.split()[1] == "400"
        named = {name.lower(): value for name, _, value in (line.partition(": ") for line in headers)}
        assert named["content-type"].startswith("application/json")
        assert named["x-request-id"]
        error = json.loads(body)["error"]
        assert (error["code"], error["src"]) == ("invalid_request", "mlxsup")
        assert error["message"].startswith("this is no HTTP request: ")
        assert len(error["message"]) < 400
        writer.close()
        assert await it.ask() < LIMIT


# No descriptors left


async def test_without_descriptors_clients_wait_and_are_served_when_there_are_some(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mlxsup.api")
    async with api({"m": fake_runner()}) as it:
        await it.ask()
        lines = [socket.socket() for _ in range(5)]
        with ExitStack() as held, descriptors_at_most(len([*Path("/dev/fd").iterdir()]) + 20):
            fill(held)
            for line in lines:
                line.setblocking(False)
                await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", it.port))
                line.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await until(lambda: "no connection can be accepted for now" in caplog.text)
            await anyio.sleep(0.5)
        for line in lines:
            reader, writer = await asyncio.open_connection(sock=line)
            assert (await closed(reader)).startswith(b"HTTP/1.1 200 ")
            writer.close()
        await it.ask()
    assert caplog.text.count("no connection can be accepted for now: Too many open files") == 1
    assert caplog.text.count("connections are accepted again") == 1


@contextmanager
def descriptors_at_most(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fill(held: ExitStack) -> None:
    """Take every descriptor that is left."""
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        while True:
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
