"""Connecting to a unix socket whose listener has as many waiting as may wait: patience instead of an error.

Over TCP the system waits by itself. Of a unix socket Linux says at once to try again, which uvloop makes an error and asyncio
takes for success, and both would look as if the runner had dropped the request. macOS says that nobody listens.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any, Final

import aiohttp
from aiohttp.client_exceptions import UnixClientConnectorError
from aiohttp.client_proto import ResponseHandler

TRY_AGAIN: Final = 0.01
"""Seconds after which it is tried again."""

_FULL: Final = (BlockingIOError, ConnectionRefusedError) if sys.platform == "darwin" else (BlockingIOError,)
"""What the system says when nobody is let in. On macOS it may also mean that nobody is there: that is found out by waiting."""


class UnixConnector(aiohttp.UnixConnector):
    """Makes connections to one unix socket; waits for its turn as long as `sock_connect` allows."""

    async def _create_connection(self, req: Any, traces: list[Any], timeout: aiohttp.ClientTimeout) -> ResponseHandler:
        del traces
        try:
            async with asyncio.timeout(timeout.sock_connect):
                line = await connect(self.path)
                _, made = await self._loop.create_unix_connection(self._factory, sock=line)
        except TimeoutError:
            raise
        except OSError as error:
            raise UnixClientConnectorError(self.path, req.connection_key, error) from error
        return made


async def connect(path: str) -> socket.socket:
    """Return a connected socket that does not block; waits while the listener lets nobody in.

    Raises:
        OSError: nobody listens there (on macOS this waits, too), or no descriptor is left.
    """
    line = socket.socket(socket.AF_UNIX)
    try:
        line.setblocking(False)
        while True:
            try:
                line.connect(path)
            except _FULL:
                await asyncio.sleep(TRY_AGAIN)
            else:
                return line
    except BaseException:
        line.close()
        raise
