"""`python -m tests.bench.serving LOOP ARGUMENTS`: the `mlxsup` command, with its daemon on that loop; by itself it takes uvloop."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from mlxsup.cli import main

if __name__ == "__main__":
    if sys.argv.pop(1) == "asyncio":
        uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]
    sys.exit(main())
