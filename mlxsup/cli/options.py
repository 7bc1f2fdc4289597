"""The flags that several verbs share, each with its one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Config = Annotated[Path | None, Parameter(help="Configuration file, instead of the one that is searched for.")]


def _text(_: object, value: object) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{value!a} is not valid in the encoding of the locale") from error


Text = Annotated[str, Parameter(validator=_text)]
"""What is sent to a daemon or a runner: any text, where a path may have any bytes."""
Url = Annotated[
    Text, Parameter(help="The daemon: http://host:port or unix:/path. Also: $MLXSUP_URL.", show_default=False)
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]
KeepAlive = Annotated[
    str | None,
    Parameter(
        help="How long the model stays loaded in the daemon after its last use, until it is unloaded: 5m, 90, 0 (not at"
        " all), -1 (for ever).",
        allow_leading_hyphen=True,
    ),
]
