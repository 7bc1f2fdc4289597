"""Accepts connections, also while the machine is out of descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

_BATCH: Final = 64
"""Connections accepted at once before the loop does something else."""
_PAUSE: Final = 0.2

_log = logging.getLogger("mlxsup.api")


@contextlib.asynccontextmanager
async def accepting(listener: socket.socket, make: Callable[[], asyncio.Protocol]) -> AsyncIterator[None]:
    """Accept what comes to `listener`.

    A loop's own server will not do: without free descriptors uvloop's turns clients away, and in a race with another thread
    that opens a file it stops listening for good; asyncio's fills the log.
    """
    acceptor = _Acceptor(listener, make)
    acceptor.listen()
    try:
        yield
    finally:
        await acceptor.close()


class _Acceptor:
    def __init__(self, listener: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._refused = False
        listener.setblocking(False)

    def listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        if self._connecting:
            await asyncio.wait(self._connecting)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                line, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:  # the client has left already
                continue
            except OSError as error:
                self._wait_for_room(error)
                return
            if self._refused:
                self._refused = False
                _log.info("connections are accepted again")
            line.setblocking(False)
            task = self._loop.create_task(self._connect(line), name="mlxsup accept")
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, line: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, line)
        except OSError:  # it left in between
            line.close()

    def _wait_for_room(self, error: OSError) -> None:
        """Leave clients waiting in the listener's queue for a moment: descriptors or memory may come free."""
        if not self._refused:
            self._refused = True
            _log.warning("no connection can be accepted for now: %s", error.strerror or error)
        self._loop.remove_reader(self._listener.fileno())
        self._pause = self._loop.call_later(_PAUSE, self.listen)
