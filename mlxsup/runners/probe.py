"""Asking one runner how it is: the HTTP session of a runner, and one look at its health path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import aiohttp

from mlxsup.config import ModelSettings
from mlxsup.engines import Address, Engine, Finding, Verdict

MAX_BODY = 64 * 1024


class Probe:
    """Looks at a runner's health path, or, for runners without one, at whether their address answers."""

    def __init__(self, model: ModelSettings, engine: Engine, address: Address, session: aiohttp.ClientSession) -> None:
        self._path = model.health or engine.default_health
        self._engine = engine
        self._address = address
        self._session = session
        self.silence = ""

    async def ask(self, limit: float) -> Finding | None:
        """Return what the engine reads out of the answer; None when none came within `limit` seconds, `silence` says how."""
        try:
            async with asyncio.timeout(limit):
                return await (self._knock() if self._path == "none" else self._get())
        except TimeoutError:
            self.silence = f"{self._path} did not answer within {limit:g} s"
        except (aiohttp.ClientError, OSError):
            self.silence = "nothing answers yet"
        return None

    async def _get(self) -> Finding:
        async with self._session.get(self._address.base_url + self._path, allow_redirects=False) as answer:
            body = await answer.content.read(MAX_BODY)
            return self._engine.read_health(answer.status, body)

    async def _knock(self) -> Finding:
        at = self._address
        opening: Awaitable[tuple[Any, asyncio.StreamWriter]] = (
            asyncio.open_unix_connection(at.socket) if at.socket else asyncio.open_connection(at.host, at.port)
        )
        _, writer = await opening
        writer.close()
        return Finding(Verdict.READY)


def open_session(address: Address, connect_timeout: float) -> aiohttp.ClientSession:
    """Return the one HTTP session of a runner: fresh connections, no limits of number or time but the connect's.

    A kept connection that the runner has just closed would fail a request that never reached it; a new one on loopback
    costs a fraction of a millisecond.
    """
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(address.socket, limit=0, force_close=True)
        if address.socket
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        trust_env=False,
        read_bufsize=256 * 1024,
    )
