"""Gates: places where a fake runner waits until a test lets it go on, so that no test has to sleep and hope."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self


class Arrival:
    """A fake runner that stands at a gate; `phase` is where in its scenario it is."""

    def __init__(self, phase: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.phase = phase
        self._reader = reader
        self._writer = writer

    def go(self) -> None:
        """Let the runner go on."""
        self._writer.write(b"\n")
        self._writer.close()

    async def left(self) -> None:
        """Return when the runner went away by itself: it died, or the client whose request it served has left."""
        try:
            await self._reader.read()
        except ConnectionError:
            return


class Gate:
    """A unix socket at which fake runners wait, for `gate@PHASE=PATH` in a scenario; it lives in a folder of its own.

    async with Gate() as gate:
        entry = fake_runner(f"gate@loading={gate.path}")
        ...
        arrival = await gate.arrival()  # the runner is up and loads
        arrival.go()
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gate-", dir=folder)
        self.path = str(Path(self._folder.name) / "gate")
        self._arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._open = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._arrive, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()
        self._folder.cleanup()

    async def arrival(self, phase: str | None = None) -> Arrival:
        """Wait for the next runner to arrive; with `phase`, let all that arrive in other phases go on."""
        while True:
            found = await self._arrivals.get()
            if phase in (None, found.phase):
                return found
            found.go()

    def open(self) -> None:
        """Let go on who stands here and who will come."""
        self._open = True
        while not self._arrivals.empty():
            self._arrivals.get_nowait().go()

    async def _arrive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        found = Arrival((await reader.readline()).decode().strip(), reader, writer)
        if self._open:
            found.go()
        else:
            self._arrivals.put_nowait(found)
