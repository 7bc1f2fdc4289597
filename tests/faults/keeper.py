"""A program that only uses the library: it brings fake runners into the states it is told, says so, and waits to be killed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

from mlxsup import Completion, Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS


async def keep(models: dict[str, object], states: dict[str, str]) -> None:
    async with Supervisor(parse({"models": models}, KEYS)) as sup:
        started = [asyncio.create_task(sup.load(model)) for model in models if model not in states]
        for model, state in states.items():
            await sup.load(model)
            if state in ("streaming", "draining"):
                answer = sup.completion(model, prompt="p")
                await anext(answer)
                started.append(asyncio.create_task(use_up(answer)))
            if state in ("draining", "stopping"):
                started.append(asyncio.create_task(sup.unload(model)))
                while sup.report(model).state != state:
                    await asyncio.sleep(0.002)
        sys.stdout.write("up\n")
        sys.stdout.flush()
        await asyncio.gather(*started)
        await asyncio.Event().wait()


async def use_up(answer: Completion) -> None:
    async for _ in answer:
        pass


if __name__ == "__main__":
    loop, told, states = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    if loop == "uvloop":
        import uvloop

        uvloop.run(keep(json.loads(told), json.loads(states)))
    else:
        asyncio.run(keep(json.loads(told), json.loads(states)))
