"""One piece of work that a runner does for a caller: chunks, or the runner's own bytes, within the limits of its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from mlxsup.errors import InvalidRequest
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.terms import Stage
from mlxsup.turns import Turn

if TYPE_CHECKING:
    from mlxsup.leases import Lease
    from mlxsup.runners.passage import Passage
    from mlxsup.runners.relay import Answer


class Completion:
    """One piece of work: an async iterator of CompletionChunk, and an async context manager that ends the work.

    Leaving the context, cancelling the caller, or dropping the object stops the work in the runner and frees its place.
    `request` is the work as the runner gets it, seed included.
    """

    def __init__(self, turn: Turn, request: CompletionRequest) -> None:
        self._answer: Answer | None = None
        self._passage: Passage | None = None
        self._lease: Lease | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        self.model = turn.model
        request.check()
        self.request = request.with_seed()
        self._turn = turn

    async def start(self) -> Self:
        """Wait until a runner has accepted the work; iterating does this by itself.

        Raises:
            MlxsupError: why there will be no answer, with the HTTP status that belongs to it.
        """
        if self._answer is None and not self._ended:
            await self._begin()
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
            chunk = await self._turn.in_time(self._answer.next_chunk(), self._stage)
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
            more = await self._turn.in_time(self._passage.pass_on(take), self._stage)
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
        """A dropped iterator, as after `break`, ends its work too: in a turn of its loop, for any thread may collect garbage."""
        if self._loop is not None and (self._answer is not None or self._lease is not None):
            with suppress(RuntimeError):  # the loop is closed, and all that was on it
                self._loop.call_soon_threadsafe(_let_go, self._answer, self._lease)

    async def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self._lease = await self._turn.lease()
            if not self._ended:
                self._answer = await self._turn.in_time(self._lease.runner.completion(self.request), self._stage)
        except BaseException:
            self._end()
            raise
        if self._ended:  # by another task, meanwhile
            self._end()

    def _stage(self) -> Stage:
        return "answer" if self._answer is not None and self._answer.started else "first_chunk"

    def _end(self) -> None:
        self._ended = True
        answer, lease = self._answer, self._lease
        self._answer = self._passage = self._lease = None
        _let_go(answer, lease)


def _let_go(answer: Answer | None, lease: Lease | None) -> None:
    try:
        if answer is not None:
            answer.close()
    finally:
        if lease is not None:
            lease.release()


def as_request(request: CompletionRequest | None, fields: dict[str, Any]) -> CompletionRequest:
    """Return the request that a caller gave, or make it of the fields.

    Raises:
        InvalidRequest: both, or fields of the wrong name or type.
    """
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
