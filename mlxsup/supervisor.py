"""Supervisor: what people import. Thin: each method is a few lines over the registry."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import msgspec

from mlxsup import config, terms
from mlxsup._version import __version__
from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES, KEYS
from mlxsup.errors import InvalidRequest
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.report import Event, RunnerReport, Status
from mlxsup.terms import Span, Stage

if TYPE_CHECKING:
    from mlxsup.engines.base import Ability
    from mlxsup.leases import Lease
    from mlxsup.registry import Registry
    from mlxsup.runners.passage import Passage
    from mlxsup.runners.relay import Answer

T = TypeVar("T")

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

        A cancellation while this waits makes it force the rest, and is passed on afterwards.
        """
        running = self._entered()
        try:
            await running.finish()
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
        settings = self.settings.resolve(model)
        bounded, kept = terms.deadline(deadline), terms.keep_alive(keep_alive)
        return Completion(self._registry(), settings, _request(request, fields), bounded, kept)

    @asynccontextmanager
    async def lease(self, model: str, *, keep_alive: Span = None) -> AsyncIterator[Lease]:
        """Hold a model ready for requests of your own to `lease.base_url`; it is not unloaded meanwhile.

        `keep_alive` is as for `completion`.

        Raises:
            MlxsupError: as `completion` does before its first chunk.
        """
        kept = terms.keep_alive(keep_alive)
        lease = await self._registry().acquire(self.settings.resolve(model).name, keep_alive=kept)
        try:
            yield lease
        finally:
            lease.release()

    async def load(self, model: str, *, keep_alive: Span = None) -> None:
        """Load a model and return when it is ready; the load goes on if this is cancelled. `keep_alive` is as for `completion`.

        Raises:
            ModelNotFound, LoadFailed, LoadTimeout, EngineUnavailable, Unloaded, ShuttingDown: why it is not.
            InvalidRequest: `keep_alive` is no span of time.
        """
        kept = terms.keep_alive(keep_alive)
        await self._registry().load(self.settings.resolve(model).name, keep_alive=kept)

    async def unload(self, model: str, *, force: bool = False) -> None:
        """Put a model out and return when its process and its group are gone.

        Work in flight may end first (`drain_timeout`) unless `force`; requests that waited get Unloaded, later ones load
        the model again. A model that is not loaded is fine.

        Raises:
            ModelNotFound: no such model or alias.
            Conflict: it is pinned, and `force` is not given.
        """
        await self._registry().unload(self.settings.resolve(model).name, force=force)

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


class Completion:
    """One piece of work: an async iterator of CompletionChunk, and an async context manager that ends the work.

    Leaving the context, cancelling the caller, or dropping the object stops the work in the runner and frees its place.
    `request` is the work as the runner gets it, seed included.
    """

    def __init__(
        self,
        registry: Registry,
        model: ModelSettings,
        request: CompletionRequest,
        deadline: float | None,
        keep_alive: float | None,
    ) -> None:
        self._answer: Answer | None = None
        self._passage: Passage | None = None
        self._lease: Lease | None = None
        self._ended = False
        self.model = model.name
        request.check()
        self.request = request.with_seed()
        self._queue_timeout = model.queue_timeout
        self._deadline = deadline
        self._ends_at = None if deadline is None else time.monotonic() + deadline
        self._keep_alive = keep_alive
        self._registry = registry

    async def start(self) -> Self:
        """Wait until a runner has accepted the work; iterating does this by itself.

        Raises:
            MlxsupError: why there will be no answer, with the HTTP status that belongs to it.
        """
        if self._answer is None and not self._ended:
            try:
                self._lease = await self._in_time(self._take_turn())
                self._answer = await self._in_time(self._lease.runner.completion(self.request))
            except BaseException:
                self._end()
                raise
        return self

    async def __aenter__(self) -> Self:
        """Return itself; the work starts with the first chunk asked for."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the work."""
        await self.aclose()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> CompletionChunk:
        """Return the next chunk as soon as it is there; the last one has `done`.

        Raises:
            MlxsupError: why the answer is not whole; never a clean end without `done`.
        """
        await self.start()
        if self._ended or self._answer is None:
            raise StopAsyncIteration
        try:
            chunk = await self._in_time(self._answer.next_chunk())
        except BaseException:
            self._end()
            raise
        if chunk.done:
            self._end()
            if chunk.seed is None:
                return msgspec.structs.replace(chunk, seed=self.request.seed)
        return chunk

    async def next_bytes(self) -> bytes:
        """Return the next bytes of the answer as the runner wrote it, b"" after the line with `done`.

        For passing an answer on: nothing is held but short lines. Use it instead of iterating, not beside it.

        Raises:
            MlxsupError: as for a chunk; in the middle of a long line, that line is left unfinished.
        """
        found: list[bytes] = []
        await self.pass_on(found.append)
        return found[0] if found else b""

    async def pass_on(self, take: Callable[[bytes], bool | None]) -> bool:
        """Hand to `take` what `next_bytes` would return, until it returns False or nothing: it wants no more for now.

        `take` is called when the bytes arrive, not when a task has its turn; it must be quick. Returns whether more may come.

        Raises:
            MlxsupError: as `next_bytes`.
        """
        if self._answer is None:
            await self.start()
        if self._ended or self._lease is None or self._answer is None:
            return False
        if self._passage is None:
            self._passage = self._lease.runner.passage(self._answer, self.request)
        try:
            more = await self._in_time(self._passage.pass_on(take))
        except BaseException:
            self._end()
            raise
        if not more:
            self._end()
        return more

    async def aclose(self) -> None:
        """End the work: the runner sees its caller leave, the place is free. Twice is once."""
        self._end()

    def __del__(self) -> None:
        """A dropped iterator, as after `break`, ends its work too."""
        self._end()

    async def _take_turn(self) -> Lease:
        try:
            async with asyncio.timeout(self._queue_timeout):
                return await self._registry.acquire(self.model, keep_alive=self._keep_alive)
        except TimeoutError:
            raise terms.waited_too_long(self.model, self._stage(), self._queue_timeout) from None

    async def _in_time(self, work: Awaitable[T]) -> T:
        """Await `work` within the request's own deadline."""
        if self._ends_at is None or self._deadline is None:
            return await work
        try:
            async with asyncio.timeout(self._ends_at - time.monotonic()):
                return await work
        except TimeoutError:
            raise terms.out_of_time(self.model, self._stage(), self._deadline) from None

    def _stage(self) -> Stage:
        """Return what the work waits for."""
        if self._lease is not None:
            return "answer" if self._answer is not None and self._answer.started else "first_chunk"
        known = self.model in self._registry.models  # it may have left the configuration in this very moment
        return "loading" if known and self._registry.report(self.model).state == "starting" else "queue"

    def _end(self) -> None:
        self._ended = True
        if self._answer is not None:
            self._answer.close()
        if self._lease is not None:
            self._lease.release()


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


def _request(request: CompletionRequest | None, fields: dict[str, Any]) -> CompletionRequest:
    if request is not None:
        if fields:
            raise InvalidRequest(f"give a CompletionRequest or its fields, not both: {', '.join(fields)}")
        return request
    images = fields.get("images", [])
    if not isinstance(images, list | tuple) or not all(
        isinstance(each, bytes | bytearray | memoryview) for each in images
    ):
        raise InvalidRequest("images must be a list of picture files, each as bytes", details={"param": "images"})
    try:
        made = msgspec.convert({**fields, "images": []}, CompletionRequest)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f"bad request: {error}") from error
    return msgspec.structs.replace(made, images=[bytes(image) for image in images])
