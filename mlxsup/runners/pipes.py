"""Reading a pipe through a protocol, with a descriptor that is closed once and no more."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import TypeVar

P = TypeVar("P", bound=asyncio.BaseProtocol)


async def connect_reader(make: Callable[[], P], descriptor: int) -> tuple[asyncio.ReadTransport, P]:
    """Have a protocol told what comes out of a pipe.

    Args:
        make: makes the protocol.
        descriptor: the pipe's reading end; it belongs to the transport from now on.

    uvloop's transport closes the descriptor and then the file object around it, too. Between the two another thread may have
    opened a file of that number, which would be closed under its hands: there the file object owns nothing.
    """
    loop = asyncio.get_running_loop()
    file = os.fdopen(descriptor, "rb", buffering=0, closefd=not on_uvloop(loop))
    return await loop.connect_read_pipe(make, file)


def on_uvloop(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell whether this is uvloop's."""
    uvloop = sys.modules.get("uvloop")
    return uvloop is not None and isinstance(loop, uvloop.Loop)
