"""Bytes of a runner's answer, from the loop to who takes them: in pieces of bounded size, and with no task woken for each.

By itself a loop reads up to 256 KiB at once, which is more than a slow client may make us hold, into memory that is new each
time; and aiohttp has no setting for it. Its protocols are made in a place that is not public. Where that is gone, all is as it
was: longer reads, and a task that wakes for each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

PIECE: Final = 64 * 1024
"""Bytes that one read takes at most."""

_SMALL: Final = 4096
"""Bytes up to which a read is handed on at once. More is left to the task: uvloop reads on and on while much comes."""

Take = Callable[[bytes], bool | None]
"""Takes bytes when they are there, often from within the loop's callback; returns whether it wants more for now."""


def read_in_pieces(connector: aiohttp.BaseConnector) -> None:
    """Have each connection of `connector` read at most PIECE bytes at a time, into a buffer that all of them share."""
    make = getattr(connector, "_factory", None)
    if isinstance(make, partial) and make.func is ResponseHandler:
        room = memoryview(bytearray(PIECE))
        made: partial[Any] = partial(PieceHandler, room, *make.args, **make.keywords)
        connector._factory = made  # noqa: SLF001


class Reader:
    """The body of a response, for one who takes it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._content = response.content
        handler = response.connection.protocol if response.connection is not None else None
        self._handler = handler if isinstance(handler, PieceHandler) else None
        self._taken = 0
        self._raised: Exception | None = None

    async def read(self, take: Take) -> bool:
        """Hand bytes to `take` as they come until it wants no more, or there are no more; returns False at the end of the body.

        Raises:
            aiohttp.ClientError, OSError: the connection broke.
            Exception: what `take` raises, and what `break_off` is told.
        """
        while self._hand_on(take):
            if self._content.at_eof():
                return False
            if self._handler is not None:
                if not await self._listen(self._handler, take):
                    return True
            elif block := await self._content.readany():
                self._taken += len(block)
                if not take(block):
                    return True
        return True

    def break_off(self, error: Exception) -> None:
        """End the reading that goes on with an error."""
        self._content.set_exception(error)
        if self._handler is not None and self._handler.on_event is not None:
            self._handler.on_event(PIECE)

    def _hand_on(self, take: Take) -> bool:
        content = self._content
        while self._taken < content.total_bytes:
            block = content.read_nowait()
            self._taken += len(block)
            if not take(block):
                return False
        if (error := content.exception()) is not None:
            raise error
        return True

    async def _listen(self, handler: PieceHandler, take: Take) -> bool:
        """Hand on what comes from within the loop's callbacks, until there is more to do than that; False: enough was taken."""
        heard = asyncio.get_running_loop().create_future()
        handler.on_event = partial(self._hear, take, heard)
        try:
            more: bool = await heard
        finally:
            handler.on_event = None
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        return more

    def _hear(self, take: Take, heard: asyncio.Future[bool], size: int) -> None:
        if heard.done():
            return
        try:
            more = size > _SMALL or self._hand_on(take)
        except Exception as error:  # noqa: BLE001 - raised where somebody awaits it, not into the loop
            self._raised = error
            heard.set_result(True)
        else:
            if not more or size > _SMALL or self._content.at_eof():
                heard.set_result(more)


class PieceHandler(ResponseHandler):
    """aiohttp's side of a connection to a server, which reads in pieces.

    `on_event` is called after each thing that happens on it, with the bytes that it brought.
    """

    def __init__(self, room: memoryview, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_event: Callable[[int], None] | None = None
        self._room = room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Put a reader of pieces between itself and the transport."""
        super().connection_made(transport)
        cast("asyncio.Transport", transport).set_protocol(_Pieces(self, self._room))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell of the end, or of what broke."""
        super().connection_lost(exc)
        if self.on_event is not None:
            self.on_event(0)

    def resume_reading(self, *args: Any, **kwargs: Any) -> None:
        """Go on after a pause; aiohttp asks for it after each read, and parses nothing at all to find that there was none."""
        if self._reading_paused:
            super().resume_reading(*args, **kwargs)


class _Pieces(asyncio.BufferedProtocol):
    """Reads into a buffer; all else is the handler's. That cannot be both: uvloop asks first whether it is a Protocol."""

    def __init__(self, handler: PieceHandler, room: memoryview) -> None:
        self._handler = handler
        self._room = room

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Lend the buffer: the loop fills it and tells of it at once, before it reads for anybody else."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        handler = self._handler
        handler.data_received(bytes(self._room[:nbytes]))
        if handler.on_event is not None:
            handler.on_event(nbytes)

    def eof_received(self) -> None:
        self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()
