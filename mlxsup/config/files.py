"""Finding and reading the configuration file, and the MLXSUP_* variables; nobody else reads either."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mlxsup.config.parsing import Engines, parse
from mlxsup.config.rules import home_path
from mlxsup.config.settings import BUILT_IN, Settings
from mlxsup.errors import ConfigError

SYSTEM_FILE: Final = Path("/etc/mlxsup/config.toml")
"""Read when the user has no file."""

_AT = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")


def read(path: Path | str | None, engines: Engines, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the configuration from the first of: `path`, $MLXSUP_CONFIG, the user's file, the system's, else built in.

    The user's file is `$XDG_CONFIG_HOME/mlxsup/config.toml`, `~/.config` where that is unset. This reads a small file at
    once, without a thread: call it before anything is served.

    Args:
        path: the file, or None to search.
        engines: the kinds of engine, each with the struct of its own keys.
        environ: where the variables are looked up.

    Raises:
        ConfigError: a named file is not there, cannot be read, is no TOML, or says what is wrong; `problems` has it all.
    """
    named = path or environ.get("MLXSUP_CONFIG")
    if named:
        file = Path(home_path(str(named)))
        return parse(_load(file, "" if path else " ($MLXSUP_CONFIG names it)"), engines, str(file), _folder(file))
    for file in (user_file(environ), SYSTEM_FILE):
        if file.is_file():
            return parse(_load(file), engines, str(file), _folder(file))
    return parse({}, engines, BUILT_IN)


def user_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the user's own configuration would be."""
    base = environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path(home_path("~/.config"))
    return folder / "mlxsup" / "config.toml"


def server_url(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the daemon's address from $MLXSUP_URL, or None where it is unset or empty."""
    return environ.get("MLXSUP_URL", "").strip() or None


def _folder(file: Path) -> str:
    return str(file.absolute().parent)


def _load(file: Path, why: str = "") -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _misread(file, f"{file}: cannot be read: {error.strerror}{why}") from error
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        raise _misread(file, f"{file}:{line}:{column}: not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _misread(file, _located(file, str(error), content.decode())) from error
    except RecursionError as error:
        raise _misread(file, f"{file}: nested too deeply") from error


def _misread(file: Path, problem: str) -> ConfigError:
    return ConfigError(problem, details={"problems": [problem], "source": str(file)})


def _located(file: Path, message: str, text: str) -> str:
    """Move the place from the end of tomllib's message to its front: `config.toml:3:5: Invalid value`."""
    found = _AT.search(message)
    if not found:
        return f"{file}: {message}"
    lines = text.split("\n")
    line, column = (found[1], found[2]) if found[1] else (len(lines), len(lines[-1]) + 1)
    return f"{file}:{line}:{column}: {_AT.sub('', message)}"
