"""`python -m tests.bench.usual LOOP KIND URL`: a relay in front of a runner, as they are usually written with aiohttp.

KIND `blocks` passes on what comes (`iter_any` to `write`), `lines` reads each line, parses it and writes it anew. The port it
listens on is printed.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import orjson
import uvloop
from aiohttp import web

from tests.bench.trivial import serve

NDJSON = {"Content-Type": "application/x-ndjson"}


class Relay:
    """One upstream and one client session."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def blocks(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=NDJSON)
        async with self._session.post(self._url, data=await request.read()) as upstream:
            await response.prepare(request)
            async for block in upstream.content.iter_any():
                await response.write(block)
        await response.write_eof()
        return response

    async def lines(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=NDJSON)
        async with self._session.post(self._url, data=await request.read()) as upstream:
            await response.prepare(request)
            held = bytearray()
            async for block in upstream.content.iter_any():
                *whole, rest = block.split(b"\n")
                for piece in whole:
                    held += piece
                    await response.write(orjson.dumps(orjson.loads(held)) + b"\n")
                    held.clear()
                held += rest
        await response.write_eof()
        return response


async def main(kind: str, url: str) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=256 * 1024) as session:
        app = web.Application()
        app.router.add_post("/completion", getattr(Relay(session, url), kind))
        await serve(app)


if __name__ == "__main__":
    run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
    run(main(*sys.argv[2:]))
