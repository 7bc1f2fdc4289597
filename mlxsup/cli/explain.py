"""`mlxsup explain`: what the daemon would do if a model were asked for now, and why."""

from __future__ import annotations

import sys

from mlxsup.cli import interrupts
from mlxsup.cli.options import Config, Text, Url
from mlxsup.cli.target import Wish, daemon


def explain(model: Text, /, *, url: Url = "", config: Config = None) -> int:
    """Tell what would happen if a model were asked for now, and why; nothing is loaded for it."""
    return interrupts.run(_explain(Wish(url=url, config=config), model))


async def _explain(wish: Wish, model: str) -> int:
    async with daemon(wish) as client:
        sys.stdout.write(f"{await client.explain(model)}\n")
    return 0
