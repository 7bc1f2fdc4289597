"""Where state is kept that outlives a process, and how its files are written: wholly or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def state_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Return where state is kept: $STATE_DIRECTORY, else $XDG_STATE_HOME/mlxsup, else ~/.local/state/mlxsup.

    systemd sets the first. Where it is not named mlxsup it is that of a program which uses the library, and a folder mlxsup in it
    is ours. What is no absolute path counts as unset: it would be another folder for each folder that we are started in.
    """
    found = os.environ if environ is None else environ
    given = found.get("STATE_DIRECTORY", "").partition(":")[0]
    if given.startswith("/"):
        first = Path(given)
        return first if first.name == "mlxsup" else first / "mlxsup"
    base = found.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "mlxsup"
    home = found.get("HOME", "")
    return Path(home if home.startswith("/") else "/tmp") / ".local/state/mlxsup"  # noqa: S108


def replace_file(path: Path, content: bytes) -> None:
    """Write a file wholly or not at all; what was begun in vain is removed, as a full disk needs it."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
