"""What the API tests share: the API of a real supervisor over fake runners, on a socket of its own, and a client."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from mlxsup import Supervisor
from mlxsup.api import create_app
from mlxsup.api import serving as serving_sockets
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import fake_runner
from tests.waiting import LIMIT

Models = dict[str, dict[str, Any]]


@dataclass
class Api:
    """A served supervisor, and a client with its URL as base."""

    sup: Supervisor
    http: aiohttp.ClientSession
    port: int

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and decoded body."""
        async with self.http.get(path) as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Send JSON, or bytes as they are; return status and decoded body."""
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with self.http.post(path, data=data, headers=headers) as answer:
            return answer.status, await answer.json()

    async def lines(self, model: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the decoded lines of a completion."""
        body = {"model": model, "prompt": "p", **fields}
        async with self.http.post("/completion", json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "application/x-ndjson"
            return [json.loads(line) for line in (await answer.read()).splitlines()]

    async def refusal(self, path: str, body: object) -> tuple[int, str, str]:
        """Send what is refused; return status, code and message."""
        status, answer = await self.post(path, body)
        return status, answer["error"]["code"], answer["error"]["message"]


def supervisor(models: Models, **server: Any) -> Supervisor:
    """A supervisor of these models, which stop fast unless they say otherwise."""
    entries = {name: {"stop_grace": "2s", **entry} for name, entry in models.items()}
    return Supervisor(parse({"server": server, "models": entries}, KEYS))


@contextlib.asynccontextmanager
async def listening(app: web.Application, *, handler_cancellation: bool = True) -> AsyncIterator[int]:
    """Serve an application on a port of its own."""
    runner = web.AppRunner(
        app,
        handler_cancellation=handler_cancellation,
        auto_decompress=False,
        access_log=None,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving(models: Models, **server: Any) -> AsyncIterator[Api]:
    """The API of these models; keyword arguments are keys of `[server]`."""
    timeout = aiohttp.ClientTimeout(total=LIMIT)
    async with (
        supervisor(models, **server) as sup,
        listening(create_app(sup)) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http,
    ):
        yield Api(sup, http, port)


@contextlib.asynccontextmanager
async def served(listener: socket.socket, **server: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the API of one model `m` as the daemon serves it; keyword arguments are keys of `[server]`."""
    unix = listener.family == socket.AF_UNIX
    connector = aiohttp.UnixConnector(listener.getsockname()) if unix else aiohttp.TCPConnector()
    base = "http://localhost" if unix else f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with (
        supervisor({"m": fake_runner()}, **server) as sup,
        serving_sockets(create_app(sup), [listener], sup.settings.server, last_bytes=1.0),
        aiohttp.ClientSession(base, connector=connector, timeout=aiohttp.ClientTimeout(total=LIMIT)) as http,
    ):
        yield http
