"""A caller on the way to a runner: the wait for a place, and whatever follows, end within the limits that belong to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from mlxsup import terms
from mlxsup.config import ModelSettings
from mlxsup.terms import Stage

if TYPE_CHECKING:
    from mlxsup.leases import Lease
    from mlxsup.registry import Registry

T = TypeVar("T")


class Turn:
    """One request for a model, from now on: a place within the model's `queue_timeout`, all of it within its own deadline.

    `deadline` and `keep_alive` are seconds, None where nothing was said.
    """

    def __init__(
        self, registry: Registry, model: ModelSettings, deadline: float | None, keep_alive: float | None
    ) -> None:
        self.model = model.name
        self._registry = registry
        self._queue_timeout = model.queue_timeout
        self._deadline = deadline
        self._ends_at = None if deadline is None else time.monotonic() + deadline
        self._keep_alive = keep_alive

    async def lease(self) -> Lease:
        """Wait for a lease.

        Raises:
            DeadlineExceeded: it did not come in time.
            MlxsupError: as `Registry.acquire`.
        """
        return await self._wait(self._registry.acquire(self.model, keep_alive=self._keep_alive))

    async def load(self) -> None:
        """Wait until the model is ready; a load that has begun goes on where this ends before it.

        Raises:
            DeadlineExceeded: it was not in time.
            MlxsupError: as `Registry.load`.
        """
        await self._wait(self._registry.load(self.model, keep_alive=self._keep_alive))

    async def unload(self, *, force: bool) -> None:
        """Wait until the model is out; that goes on where this ends before it.

        Raises:
            DeadlineExceeded: it was not in time.
            MlxsupError: as `Registry.unload`.
        """
        await self.in_time(self._registry.unload(self.model, force=force), lambda: "unloading")

    async def in_time(self, work: Awaitable[T], stage: Callable[[], Stage]) -> T:
        """Await `work` within the deadline; `stage` is asked what it waited for.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        if self._ends_at is None or self._deadline is None:
            return await work
        try:
            async with asyncio.timeout(self._ends_at - time.monotonic()):
                return await work
        except TimeoutError:
            raise terms.out_of_time(self.model, stage(), self._deadline) from None

    async def _wait(self, place: Awaitable[T]) -> T:
        return await self.in_time(self._wait_in_queue(place), self._stage)

    async def _wait_in_queue(self, place: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._queue_timeout):
                return await place
        except TimeoutError:
            raise terms.waited_too_long(self.model, self._stage(), self._queue_timeout) from None

    def _stage(self) -> Stage:
        known = self.model in self._registry.models  # it may have left the configuration in this very moment
        return "loading" if known and self._registry.report(self.model).state == "starting" else "queue"
