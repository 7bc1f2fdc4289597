"""`python -m tests.bench.trivial LOOP`: a server of aiohttp that does nothing but answer. The port it listens on is printed."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import web


async def nothing(_request: web.Request) -> web.Response:
    return web.Response(body=b"{}", content_type="application/json")


async def main() -> None:
    app = web.Application()
    app.router.add_get("/", nothing)
    await serve(app)


async def serve(app: web.Application) -> None:
    """Serve an app on a port of its own, which is printed, for ever."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
    run(main())
