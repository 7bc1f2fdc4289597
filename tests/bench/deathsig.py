"""`python -m tests.bench.deathsig LOOP NUMBER SCENARIO FOLDER`: a program whose fake runners asked the kernel to die with it.

That is what a supervisor without a sentinel can do: each child calls prctl(PR_SET_PDEATHSIG, SIGKILL) before it becomes the
runner. Linux only.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys

import uvloop

from mlxsup.testing import fake_runner

PR_SET_PDEATHSIG = 1
AS_RUNNER = "as-runner"


async def keep(number: int, scenario: str, folder: str) -> None:
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.deathsig", AS_RUNNER, scenario, f"{folder}/{index}.sock"),
            start_new_session=True,
        )
        for index in range(number)
    ]
    await asyncio.gather(*(child.wait() for child in children))


def become_runner(scenario: str, socket: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    words = {"{socket}": socket, "{model}": "m"}
    command = [words.get(word, word) for word in fake_runner(scenario)["command"]]
    os.execv(command[0], command)


if __name__ == "__main__":
    if sys.argv[1] == AS_RUNNER:
        become_runner(*sys.argv[2:])
    else:
        run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
        run(keep(int(sys.argv[2]), *sys.argv[3:]))
