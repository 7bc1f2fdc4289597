"""Serves an application on sockets, safe from clients that dawdle: one that does not finish its request, or does not take its
answer, is left after a time; one that speaks no HTTP gets an error like every other.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import socket
import termios
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Final, cast

from aiohttp import web

from mlxsup.api.accepting import accepting
from mlxsup.api.answers import error_response, unexpected
from mlxsup.config import ServerSettings
from mlxsup.errors import InvalidRequest, MlxsupError

IDLE: Final = 75.0
"""Seconds for which a connection is kept between two requests: longer than proxies keep theirs."""

_LINGER: Final = 10.0
"""Seconds for which what a client still sends is read and dropped after an answer that did not wait for all of it."""
_LOOKS: Final = 4
"""Looks at a stuck answer within `write_timeout`."""
_LONGEST_COMPLAINT: Final = 300

_log = logging.getLogger("mlxsup.api")


@contextlib.asynccontextmanager
async def serving(
    app: web.Application, listeners: Iterable[socket.socket], settings: ServerSettings, *, last_bytes: float
) -> AsyncIterator[None]:
    """Serve `app` on sockets that listen already, and still do afterwards.

    On leaving, answers that are not finished, or not read by their clients, have `last_bytes` seconds.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=last_bytes)
    await runner.setup()
    assert runner.server is not None
    loop = asyncio.get_running_loop()
    try:
        async with contextlib.AsyncExitStack() as stack:
            for listener in listeners:
                make = partial(Connection, runner.server, settings, loop=loop, is_loopback=_is_loopback(listener))
                await stack.enter_async_context(accepting(listener, make))
            yield
    finally:
        await runner.cleanup()


class Connection(web.RequestHandler):
    """One connection of a client: aiohttp's, with two timers and errors of our shape. No body is unpacked.

    `is_loopback` tells whether its listener has an address that only this machine can reach.

    Counts on this of aiohttp 3.14: `_request_count` grows with each head that is whole, `_waiter` is a pending future while
    the next head is awaited.
    """

    __slots__ = ("_head_timer", "_line", "_lost", "_moved_at", "_settings", "_stuck", "_stuck_timer", "is_loopback")

    def __init__(
        self, server: web.Server, settings: ServerSettings, *, loop: asyncio.AbstractEventLoop, is_loopback: bool
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=cast("logging.Logger", None),  # as AppRunner passes it on; the annotation forgets it
            keepalive_timeout=IDLE,
            lingering_time=min(_LINGER, settings.header_timeout),
            auto_decompress=False,  # aiohttp does that on the loop, however much a few bytes become
        )
        self.is_loopback = is_loopback
        self._settings = settings
        self._line: asyncio.Transport | None = None
        self._lost = asyncio.Event()
        self._head_timer = _Timer(loop)
        self._stuck_timer = _Timer(loop)
        self._stuck = 0
        self._moved_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the client its time for the head of the first request."""
        self._line = cast("asyncio.Transport", transport)
        self._line.set_write_buffer_limits(high=0)  # paused means: the system takes no more, this client does not read
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Watch how long a head takes, from its first byte to its last."""
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._head_timer.stop()
        elif not self._head_timer.runs and self._waiter is not None and not self._waiter.done():
            self._await_head()

    def pause_writing(self) -> None:
        """The client does not read: watch whether it goes on."""
        super().pause_writing()
        self._stuck, self._moved_at = self._unsent(), time.monotonic()
        self._look_again()

    def resume_writing(self) -> None:
        """The client has taken all there was."""
        self._stuck_timer.stop()
        super().resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Nothing is left to watch."""
        self._line = None
        self._lost.set()
        self._head_timer.stop()
        self._stuck_timer.stop()
        super().connection_lost(exc)

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """End it for the end of the program: an answer that is finished has `timeout` seconds more to be read.

        One that is not read at all would keep uvloop from closing, and so the program from ending.
        """
        await super().shutdown(timeout)
        if self._line is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._lost.wait()
        if self._line is not None:
            self._line.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp itself refuses, such as bytes that are no HTTP, in the shape of all errors."""
        super().handle_error(request, status, exc, message)  # logs it, and raises when a part of an answer is out
        asked = cast("web.Request", request)
        error: MlxsupError
        if status == 400:
            why = " ".join((message or str(exc)).split())[:_LONGEST_COMPLAINT]
            error = InvalidRequest(f"this is no HTTP request: {why}")
        else:
            error = unexpected(asked)
        response = error_response(asked, error)
        response.force_close()
        return response

    def _await_head(self) -> None:
        self._head_timer.start(self._settings.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        _log.debug("a client did not finish the head of its request within %g s", self._settings.header_timeout)
        self.force_close()

    def _unsent(self) -> int:
        return self._line.get_write_buffer_size() + _in_the_system(self._line) if self._line is not None else 0

    def _look_again(self) -> None:
        self._stuck_timer.start(self._settings.write_timeout / _LOOKS, self._look)

    def _look(self) -> None:
        now, unsent = time.monotonic(), self._unsent()
        if unsent < self._stuck:
            self._moved_at = now
        self._stuck = unsent
        if now - self._moved_at < self._settings.write_timeout:
            self._look_again()
        elif self._line is not None:
            _log.info("a client took nothing of its answer for %g s: left", self._settings.write_timeout)
            self._line.abort()


def _is_loopback(listener: socket.socket) -> bool:
    inet = listener.family in {socket.AF_INET, socket.AF_INET6}
    return inet and ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _in_the_system(line: asyncio.Transport) -> int:
    """Return the bytes that the system holds for the client, 0 where it does not tell; room for ours it makes only by the MB."""
    held = array.array("i", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(line.get_extra_info("socket").fileno(), termios.TIOCOUTQ, held)
    return held[0]


class _Timer:
    """One call that comes later, or none."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, self._ring, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self, call: Callable[[], None]) -> None:
        self._handle = None
        call()
