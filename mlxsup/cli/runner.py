"""`mlxsup runner`: this process becomes a runner. The supervisor starts it; a person may, to look at one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxsup.cli.failures import CommandFailed
from mlxsup.errors import InvalidRequest


def runner(
    *,
    model: str,
    imagegen_engine: Annotated[bool, Parameter(negative="")] = False,
    port: int | None = None,
    socket: Path | None = None,
    ready_fd: int | None = None,
) -> int:
    """Serve one model over HTTP until SIGINT or SIGTERM.

    Args:
        model: builtin:emoji, or a folder that holds a model.
        imagegen_engine: Make pictures with MLX; the one kind of runner there is.
        port: Listen on this port of 127.0.0.1.
        socket: Listen on this unix socket.
        ready_fd: Write one byte to this descriptor when ready.
    """
    if not imagegen_engine:
        raise InvalidRequest("say which kind of runner: --imagegen-engine")
    if (port is None) == (socket is None):
        raise InvalidRequest("give either --port or --socket")
    try:
        from mlxsup.imagegen import server
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    try:
        return server.main(
            model=model, host="127.0.0.1", port=port, socket=str(socket) if socket else None, ready_fd=ready_fd
        )
    except ModuleNotFoundError as error:
        raise _missing(error) from error


def _missing(error: ModuleNotFoundError) -> CommandFailed:
    package = (error.name or "").partition(".")[0]
    if package not in ("mlx", "PIL"):
        raise error
    return CommandFailed(f"{package} is not installed; mend: pip install 'mlxsup[imagegen]'")
