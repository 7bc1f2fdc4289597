"""`python -m tests.soak.crowd LOOP`: many requests for more models than fit, with the scheduler as it is out of the box.

Models stay for the usual 5 s before they give way, so this takes minutes. Prints what was wrong, a line each.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

import uvloop

from mlxsup import Supervisor
from mlxsup.config import SchedulerSettings
from tests.crowding import gib, settings, two_hundred_requests
from tests.soak.folders import own_folders


async def run() -> list[str]:
    """Serve the crowd; returns what was wrong."""
    models = {f"m{number}": gib("tokens=1") for number in range(10)}
    usual = {"min_residency": SchedulerSettings().min_residency}
    async with Supervisor(settings("3.5GiB", usual, **models)) as sup:
        return await two_hundred_requests(sup, [*models])


def main() -> int:
    """Read the argument, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.crowd", description=__doc__)
    parser.add_argument("loop", choices=("asyncio", "uvloop"))
    loop = uvloop if parser.parse_args().loop == "uvloop" else asyncio
    logging.getLogger("mlxsup").setLevel(logging.CRITICAL)
    with own_folders():
        wrong = loop.run(run())
    for line in wrong:
        sys.stdout.write(f"{line}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
