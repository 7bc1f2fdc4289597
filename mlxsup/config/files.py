"""Finding and reading the configuration file, and the MLXSUP_* variables; nobody else reads either."""

from __future__ import annotations

import codecs
import os
import re
import stat
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
        return _parsed(file, _content(file, "" if path else " ($MLXSUP_CONFIG names it)"), engines)
    for file in (user_file(environ), SYSTEM_FILE):
        if _is_file(file):
            return _parsed(file, _content(file), engines)
    return parse({}, engines, BUILT_IN)


def reread(source: str, engines: Engines, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the configuration once more from where it came from; what was built in is searched for anew.

    A pipe was read up at the start, and a file that is empty is about to be written: neither means that all models are to go.

    Args:
        source: `Settings.source` of what is in force.
        engines: as for `read`.
        environ: as for `read`.

    Raises:
        ConfigError: as `read` does; or it is empty or no regular file by now.
    """
    if source == BUILT_IN:
        return read(None, engines, environ=environ)
    file = Path(source)
    content = _content(file, regular=True)
    if not content.strip():
        raise _misread(file, f"{file}: is empty")
    return _parsed(file, content, engines)


def user_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the user's own configuration would be."""
    base = environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path(home_path("~/.config"))
    return folder / "mlxsup" / "config.toml"


def server_url(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the daemon's address from $MLXSUP_URL, or None where it is unset or empty."""
    return environ.get("MLXSUP_URL", "").strip() or None


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:  # a folder that may not be looked into
        raise _misread(file, f"{file}: cannot be read: {error.strerror}") from error


def _folder(file: Path) -> str:
    return str(file.absolute().parent)


def _parsed(file: Path, content: bytes, engines: Engines) -> Settings:
    return parse(_tables(file, content), engines, str(file), _folder(file))


def _content(file: Path, why: str = "", *, regular: bool = False) -> bytes:
    """Return what is in the file, without the mark that editors on Windows put in front."""
    try:
        with open(file, "rb", opener=_open_at_once if regular else None) as opened:
            if regular and not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise _misread(file, f"{file}: is no regular file, so it cannot be read twice")
            return opened.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _misread(file, f"{file}: cannot be read: {error.strerror}{why}") from error


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever would write into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _tables(file: Path, content: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        raise _misread(file, f"{file}:{line}:{column}: not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _misread(file, _located(file, str(error), content.decode())) from error
    except ValueError as error:  # of int(): the text of a number may not have as many digits as it likes
        raise _misread(file, f"{file}: holds a number of too many digits") from error
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
