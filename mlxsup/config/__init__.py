"""The configuration: what can be set, read from TOML and the MLXSUP_* variables; nobody else reads either.

`read` finds and reads the file, `reread` reads it once more, `parse` does the same for plain tables, `schema`, `example` and
`show` describe. The kinds of engine are handed in, so that this room knows none of them.
"""

from __future__ import annotations

from mlxsup.config.describing import example, schema, show
from mlxsup.config.files import read, reread, server_url
from mlxsup.config.parsing import Engines, built_in, parse
from mlxsup.config.rules import VARIABLE, Listen, PathText, parse_listen
from mlxsup.config.settings import BUILT_IN, ModelSettings, SchedulerSettings, ServerSettings, Settings
from mlxsup.config.units import Duration, Size, format_duration, format_size, rounded_size

__all__ = [
    "BUILT_IN",
    "VARIABLE",
    "Duration",
    "Engines",
    "Listen",
    "ModelSettings",
    "PathText",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "Size",
    "built_in",
    "example",
    "format_duration",
    "format_size",
    "parse",
    "parse_listen",
    "read",
    "reread",
    "rounded_size",
    "schema",
    "server_url",
    "show",
]
