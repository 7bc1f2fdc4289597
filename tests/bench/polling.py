"""`python -m tests.bench.polling LOOP ADDRESS...`: asks the health of every runner once a second, as supervisors usually do."""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop

PAUSE = 1.0


async def main(addresses: list[str]) -> None:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        for address in addresses:
            tasks.create_task(poll(session, f"http://{address}/health"))


async def poll(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.get(url) as answer:
            await answer.json()
        await asyncio.sleep(PAUSE)


if __name__ == "__main__":
    run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
    run(main(sys.argv[2:]))
