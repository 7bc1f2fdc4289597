"""Decides whom a command talks to: a daemon by its address, a daemon that happens to run, or a supervisor of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from mlxsup import config
from mlxsup.cli.client import Client
from mlxsup.cli.failures import CommandFailed
from mlxsup.daemon.addresses import local_url
from mlxsup.engines import ENGINES, KEYS
from mlxsup.errors import InvalidRequest, MlxsupError
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.report import RunnerReport

_PROBE_TIMEOUT: Final = 0.5
"""Seconds in which a daemon that nobody named must say that it is one."""


class Work(Protocol):
    """A completion under way, here or in a daemon."""

    async def start(self) -> object:
        """Wait until the first chunk is about to come."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[CompletionChunk]: ...


class Local(Protocol):
    """A supervisor of our own, which is not imported where a daemon does the work."""

    def completion(self, model: str, request: CompletionRequest, /, *, keep_alive: float | None = None) -> Work:
        """Begin a piece of work."""

    def report(self, model: str) -> RunnerReport:
        """Return the state of one model."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says of whom to talk to; empty where it says nothing."""

    url: str = ""
    config: Path | None = None
    local: bool = False

    @property
    def named_url(self) -> str:
        """The daemon that --url or MLXSUP_URL names, or ""."""
        return self.url or config.server_url(os.environ) or ""


@contextlib.asynccontextmanager
async def for_work(wish: Wish) -> AsyncIterator[Client | Local]:
    """Open whoever is to work: the daemon that was named, else one that runs where it is configured, else our own supervisor.

    Raises:
        InvalidRequest: --local and --url at once.
        ConfigError: the configuration is needed and cannot be read.
    """
    if wish.local and wish.url:
        raise InvalidRequest("--local and --url contradict each other; give one of them")
    if wish.named_url and not wish.local:
        async with Client(wish.named_url) as client:
            await client.greet()
            yield client
        return
    settings = config.read(wish.config, KEYS)
    found = None if wish.local else await _running(settings)
    if found is not None:
        async with found:
            yield found
        return
    from mlxsup.supervisor import Supervisor  # with a daemon it is not needed

    async with Supervisor(settings) as sup:
        yield sup


async def makes_pictures(target: Client | Local, model: str) -> bool:
    """Tell whether `model` has an engine that is known to make pictures; False when whoever does the work does not tell."""
    try:
        kind = await target.engine_of(model) if isinstance(target, Client) else target.report(model).engine
    except MlxsupError:
        return False
    return kind in ENGINES and ENGINES[kind].pictures


@contextlib.asynccontextmanager
async def daemon(wish: Wish) -> AsyncIterator[Client]:
    """Open the daemon, for commands that make no sense without one.

    Raises:
        CommandFailed: none answers; says how to start it.
        ConfigError: the configuration is needed and cannot be read.
    """
    if wish.named_url:
        async with Client(wish.named_url) as client:
            await client.greet()
            yield client
        return
    settings = config.read(wish.config, KEYS)
    found = await _running(settings)
    if found is None:
        tried = " or ".join(_urls(settings))
        raise CommandFailed(f"no mlxsup daemon answers at {tried}; start one with: mlxsup serve")
    async with found:
        yield found


async def _running(settings: config.Settings) -> Client | None:
    """Return a client, not yet entered, of the daemon that runs where it is configured."""
    for url in _urls(settings):
        async with Client(url) as client:
            if await client.is_mlxsup(_PROBE_TIMEOUT):
                return Client(url, found=True)
    return None


def _urls(settings: config.Settings) -> list[str]:
    return [local_url(config.parse_listen(address)) for address in settings.server.listen]
