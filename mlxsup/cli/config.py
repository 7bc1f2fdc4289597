"""`mlxsup config check`, `show` and `schema`."""

from __future__ import annotations

import sys

import orjson

from mlxsup import config as configuration
from mlxsup.cli.options import Config
from mlxsup.engines import KEYS


def check(*, config: Config = None) -> int:
    """Read the configuration and report every problem in it; exit code 2 if there is one."""
    settings = configuration.read(config, KEYS)
    count = len(settings.models)
    sys.stdout.write(f"{settings.source}: ok, {count} model{'' if count == 1 else 's'}: {', '.join(settings.models)}\n")
    return 0


def show(*, config: Config = None) -> int:
    """Print the configuration in effect, and the file it came from."""
    sys.stdout.write(configuration.show(configuration.read(config, KEYS)))
    return 0


def schema() -> int:
    """Print the JSON schema of the configuration, for editors."""
    sys.stdout.write(orjson.dumps(configuration.schema(KEYS), option=orjson.OPT_INDENT_2).decode() + "\n")
    return 0
