"""Recording what a Supervisor does, so that a test waits for it instead of sleeping."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from mlxsup.report import Event, State
from mlxsup.supervisor import Supervisor


class EventRecorder:
    """All transitions of a Supervisor from the moment this is entered.

    async with Supervisor(settings) as sup, EventRecorder(sup) as recorder:
        await sup.load("m")
        await recorder.until("m", "ready")
        assert recorder.states("m") == ["starting", "ready"]
    """

    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup
        self._changed = asyncio.Event()
        self.events: list[Event] = []

    async def __aenter__(self) -> Self:
        self._listener = self._sup.events()
        self._task = asyncio.create_task(self._record(), name="mlxsup event recorder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def states(self, model: str) -> list[State]:
        """Return the states that a model has gone to, in order."""
        return [event.state for event in self.events if event.model == model]

    async def until(self, model: str, state: State, times: int = 1) -> Event:
        """Wait until a model has gone to `state` so many times, those before the call counted; bound it yourself."""
        while True:
            found = [event for event in self.events if (event.model, event.state) == (model, state)]
            if len(found) >= times:
                return found[times - 1]
            self._changed.clear()
            await self._changed.wait()

    async def _record(self) -> None:
        async for event in self._listener:
            self.events.append(event)
            self._changed.set()
