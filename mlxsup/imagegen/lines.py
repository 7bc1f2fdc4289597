"""The lines of one answer between the worker that writes them and the socket that takes them, however slowly."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import msgspec

from mlxsup.protocol import CompletionChunk

WAITING_PREVIEWS = 4 << 20
"""Bytes of previews that may wait for one reader; the oldest ones beyond that are not sent."""

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, eq=False)
class Line:
    """One line as it is sent.

    Attributes:
        data: JSON and a newline.
        preview: whether it may be left out.
        last: whether the answer ends with it.
    """

    data: bytes
    preview: bool = False
    last: bool = False

    @classmethod
    def of(cls, chunk: CompletionChunk) -> Line:
        """Encode a chunk; takes a while for a large picture."""
        return cls(_encoder.encode(chunk) + b"\n", preview=chunk.preview, last=chunk.done)


class Lines:
    """Waiting lines, in order. A reader who is too slow for previews misses some of them, never a step or the result."""

    def __init__(self) -> None:
        self._waiting: deque[Line] = deque()
        self._some = asyncio.Event()

    def put(self, line: Line) -> None:
        """Add a line; for the loop's thread."""
        self._waiting.append(line)
        self._some.set()
        if line.preview:
            self._drop_old_previews()

    async def get(self) -> Line:
        """Take the next line, as soon as there is one."""
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        return self._waiting.popleft()

    def _drop_old_previews(self) -> None:
        previews = [line for line in self._waiting if line.preview]
        held = sum(len(line.data) for line in previews)
        for line in previews[:-1]:
            if held <= WAITING_PREVIEWS:
                return
            held -= len(line.data)
            self._waiting.remove(line)
