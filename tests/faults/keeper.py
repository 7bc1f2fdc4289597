"""A program that only uses the library: it loads fake runners, tells their pids, and waits to be killed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS


async def keep(models: dict[str, object], load: list[str]) -> None:
    async with Supervisor(parse({"models": models}, KEYS)) as sup:
        for model in load:
            await sup.load(model)
        started = [asyncio.create_task(sup.load(model)) for model in models if model not in load]
        sys.stdout.write("up\n")
        sys.stdout.flush()
        await asyncio.gather(*started)
        await asyncio.Event().wait()


if __name__ == "__main__":
    loop, told, load = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    if loop == "uvloop":
        import uvloop

        uvloop.run(keep(json.loads(told), json.loads(load)))
    else:
        asyncio.run(keep(json.loads(told), json.loads(load)))
