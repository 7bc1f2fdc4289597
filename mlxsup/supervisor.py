"""Supervisor: what people import. Thin: each method is a few lines over the registry."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from mlxsup import config, terms
from mlxsup._version import __version__
from mlxsup.completion import Completion, as_request
from mlxsup.config import Settings
from mlxsup.engines import ENGINES, KEYS
from mlxsup.forks import Owner
from mlxsup.protocol import CompletionRequest
from mlxsup.report import Event, RunnerReport, Status
from mlxsup.terms import Span
from mlxsup.turns import Turn

if TYPE_CHECKING:
    from mlxsup.engines.base import Ability
    from mlxsup.leases import Lease
    from mlxsup.registry import Registry

log = logging.getLogger(__name__)

EVENT_BACKLOG = 10_000
"""Transitions kept for a subscriber that does not read; older ones are dropped."""


class Supervisor:
    """Starts, watches, uses and ends the runners of the configured models.

    Enter it (`async with`) before use. It may be entered in one task and left in another, be used again after it was left,
    and share a program with others. Leaving it takes no new work, lets work in flight end (each model's `drain_timeout`),
    and returns when no process is left.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Take `settings`; without any, the one model is the built-in `emoji`.

        No process is started before a model is asked for.
        """
        from mlxsup.registry import Registry

        self.settings = config.parse({}, KEYS) if settings is None else settings
        self._make_registry = Registry
        self._running: _Running | None = None

    @classmethod
    def from_config(cls, path: str | Path | None = None) -> Self:
        """Read `path`, or the configuration file of the machine where it is None, or else the built-in settings.

        Raises:
            ConfigError: the file cannot be used; `problems` lists why.
        """
        return cls(config.read(path, KEYS))

    async def __aenter__(self) -> Self:
        """Start the owner task.

        Raises:
            RuntimeError: it is entered already.
        """
        if self._running is not None:
            raise RuntimeError("this Supervisor is entered already")
        self._running = _Running(self._make_registry(self.settings))
        try:
            await self._running.wait_started()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down in order; raises what crashed the owner task, if anything did.

        A cancellation while this waits makes it force the rest, and is passed on afterwards. In a child that the program has
        forked it does nothing: what runs is the parent's.
        """
        running = self._entered()
        try:
            if running.owner.is_here:
                await running.finish()
            else:
                log.warning(
                    "a child that was forked out of the event loop of %d must end by os._exit()", running.owner.pid
                )
        finally:
            self._running = None

    # Work

    def completion(
        self,
        model: str,
        request: CompletionRequest | None = None,
        *,
        deadline: Span = None,
        keep_alive: Span = None,
        **fields: Any,
    ) -> Completion:
        """Ask a model for a completion: text or a picture, as CompletionChunks while they arrive.

        Give a CompletionRequest or its fields. `deadline` bounds the whole of it, from now; `keep_alive` is how long the model
        shall stay after its last use (0: not at all, negative: for ever), until it is unloaded. Both are seconds, or text such
        as "5m". Nothing is sent before it is iterated or started.

        Raises:
            ModelNotFound: no such model or alias.
            InvalidRequest: fields of the wrong name or type, both a request and fields, or no span of time.
        """
        return Completion(self._turn(model, deadline, keep_alive), as_request(request, fields))

    @asynccontextmanager
    async def lease(self, model: str, *, deadline: Span = None, keep_alive: Span = None) -> AsyncIterator[Lease]:
        """Hold a model ready for requests of your own to `lease.base_url`; it is not unloaded meanwhile.

        `deadline` bounds the wait for it, from now; `keep_alive` is as for `completion`.

        Raises:
            MlxsupError: as `completion` does before its first chunk.
        """
        lease = await self._turn(model, deadline, keep_alive).lease()
        try:
            yield lease
        finally:
            lease.release()

    async def load(self, model: str, *, deadline: Span = None, keep_alive: Span = None) -> None:
        """Load a model and return when it is ready.

        A load that has begun goes on if this is cancelled or ends by `deadline` or the model's `queue_timeout`, which bound
        the wait alone; one that still waits for memory is given up then. `keep_alive` is as for `completion`.

        Raises:
            ModelNotFound, LoadFailed, LoadTimeout, EngineUnavailable, Unloaded, ShuttingDown, QueueFull: why it is not.
            DeadlineExceeded: it was not ready in time.
            InvalidRequest: `deadline` or `keep_alive` is no span of time.
        """
        await self._turn(model, deadline, keep_alive).load()

    async def unload(self, model: str, *, force: bool = False, deadline: Span = None) -> None:
        """Put a model out and return when its process and its group are gone.

        Work in flight may end first (`drain_timeout`) unless `force`; requests that waited get Unloaded, later ones load
        the model again. A model that is not loaded is fine. The unloading goes on if this is cancelled or ends by `deadline`.

        Raises:
            ModelNotFound: no such model or alias.
            Conflict: it is pinned, and `force` is not given.
            DeadlineExceeded: it was not gone in time.
            InvalidRequest: `deadline` is no span of time.
        """
        await self._turn(model, deadline, None).unload(force=force)

    async def reload(self, settings: Settings) -> None:
        """Take over another configuration while running.

        Models that it changes or lacks end their work first (`drain_timeout`); all others go on. Those that are changed are
        loaded anew when they are asked for. What concerns the server is taken over by a restart only.

        Raises:
            ConfigError: it names devices that this machine does not have; nothing is changed then.
        """
        await self._registry().reload(settings)
        self.settings = settings

    async def drain(self, *, force: bool = False) -> None:
        """Begin the shutdown now: refuse new work, let work in flight end unless `force`; returns when nothing runs."""
        await self._entered().close(force=force)

    def require(self, model: str, ability: Ability) -> None:
        """Refuse what a model's engine cannot do at all, such as an embedding from an image runner.

        Raises:
            ModelNotFound: no such model or alias.
            NotSupported: the engine has no such ability.
        """
        ENGINES[self.settings.resolve(model).engine].require(ability)

    # Questions

    def status(self) -> Status:
        """Return the state of everything; never waits."""
        running = self._entered()
        return Status(
            version=__version__,
            pid=os.getpid(),
            started=running.started,
            closing=running.registry.closing,
            runners=[running.registry.report(name) for name in running.registry.models],
            devices=running.registry.devices(),
        )

    def report(self, model: str) -> RunnerReport:
        """Return the state of one model; never waits.

        Raises:
            ModelNotFound: no such model or alias.
        """
        return self._registry().report(self.settings.resolve(model).name)

    async def explain(self, model: str) -> str:
        """Say what would happen if a model were asked for now, and why; looks at its files and at what is free, loads nothing.

        Raises:
            ModelNotFound: no such model or alias.
        """
        return await self._registry().explain(self.settings.resolve(model).name)

    def logs(self, model: str) -> list[str]:
        """Return the first and last lines of error output of the model's present or last process.

        Raises:
            ModelNotFound: no such model or alias.
        """
        return self._registry().last_words(self.settings.resolve(model).name)

    def events(self) -> Events:
        """Subscribe to transitions, from now on: an async iterator that ends with the supervisor."""
        return Events(self._registry())

    def _entered(self) -> _Running:
        if self._running is None:
            raise RuntimeError("enter the Supervisor first: async with Supervisor() as sup")
        return self._running

    def _registry(self) -> Registry:
        return self._entered().registry

    def _turn(self, model: str, deadline: Span, keep_alive: Span) -> Turn:
        settings = self.settings.resolve(model)
        return Turn(self._registry(), settings, terms.deadline(deadline), terms.keep_alive(keep_alive))


class Events:
    """Transitions as they happen, an async iterator; ends with the supervisor or by `close`."""

    def __init__(self, registry: Registry) -> None:
        self._waiting: deque[Event | None] = deque(maxlen=EVENT_BACKLOG)
        self._arrived = asyncio.Event()
        self._registry = registry
        registry.subscribe(self)

    def close(self) -> None:
        """Stop listening."""
        self._registry.unsubscribe(self)
        self.take(None)

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Event:
        """Return the next transition."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._waiting[0]
        if event is None:
            raise StopAsyncIteration
        self._waiting.popleft()
        return event

    def take(self, event: Event | None) -> None:
        """Take a transition from the registry; None is the end."""
        self._waiting.append(event)
        self._arrived.set()


class _Running:
    """The owner task of an entered Supervisor, which outlives the task that entered it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.owner = Owner()
        self.started = time.time()
        self._ready = asyncio.Event()
        self._task = asyncio.create_task(registry.run(self._ready), name="mlxsup owner")

    async def wait_started(self) -> None:
        """Wait until the registry takes questions; a crash before that is raised by `finish`."""
        ready = asyncio.create_task(self._ready.wait(), name="mlxsup start")
        try:
            await asyncio.wait({ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._task.done():
            await self.finish()

    async def close(self, *, force: bool) -> None:
        """Ask for the end and wait for it; a crash of the owner is raised by `finish`."""
        self.registry.shut_down(force=force)
        await asyncio.wait({self._task})

    async def finish(self) -> None:
        """Shut down and raise what the owner raised; a cancellation meanwhile forces the rest and is passed on."""
        cancelled: asyncio.CancelledError | None = None
        try:
            await self.close(force=False)
        except asyncio.CancelledError as error:
            cancelled = error
            with anyio.CancelScope(shield=True):
                await self._finish_by_force()
        if not self._task.cancelled() and (crash := self._task.exception()) is not None:
            raise crash
        if cancelled is not None:
            raise cancelled

    async def _finish_by_force(self) -> None:
        while not self._task.done():
            with suppress(asyncio.CancelledError):  # cancelled again: there is nothing more to hurry
                await self.close(force=True)
