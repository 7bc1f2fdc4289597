"""What a person is told when a command fails: one clear line on stderr, and the exit code that goes with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from mlxsup.errors import BodyTooLarge, ConfigError, InvalidRequest, MlxsupError, ModelNotFound

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2

_USAGE_ERRORS: Final = (ConfigError, InvalidRequest, ModelNotFound, BodyTooLarge)


class CommandFailed(MlxsupError):
    """What a command was to do did not work, and nothing of the supervisor is to blame."""

    code = "command_failed"


def say(line: str) -> None:
    """Write one line to stderr, with our name in front."""
    tell(f"mlxsup: {line}")


def tell(line: str) -> None:
    """Write one line to stderr. One that cannot be written is lost: what it is about goes on."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def lines_of(error: MlxsupError) -> Iterator[str]:
    """Put an error into lines: one, but for each problem of a configuration its own."""
    if isinstance(error, ConfigError):
        source = str(error.details.get("source", ""))
        yield from (line if line.startswith(source) else f"{source}: {line}" for line in error.problems)
    else:
        yield " ".join(error.message.split())


def not_installed(error: ModuleNotFoundError) -> CommandFailed:
    """Return what to say of a missing part of the extra `imagegen`. Raises `error` itself for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in ("mlx", "PIL"):
        raise error
    return CommandFailed(f"{package} is not installed; mend: pip install 'mlxsup[imagegen]'")


def exit_code_of(error: MlxsupError) -> int:
    """Tell what was asked for wrongly (2) from what failed (1)."""
    if isinstance(error, _USAGE_ERRORS) or (error.source == "runner" and 400 <= error.status < 500):
        return USAGE
    return FAILED
