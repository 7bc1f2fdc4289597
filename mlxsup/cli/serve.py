"""`mlxsup serve`: the daemon in the foreground."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from msgspec.structs import replace

from mlxsup import config as configuration
from mlxsup.cli.options import Config
from mlxsup.engines import KEYS
from mlxsup.errors import InvalidRequest


def serve(
    *, config: Config = None, listen: Annotated[list[str] | None, Parameter(consume_multiple=False, negative="")] = None
) -> int:
    """Run the daemon until SIGTERM or Ctrl-C; a second one does not wait for work in flight. SIGHUP reads the configuration again.

    Args:
        config: Configuration file, instead of the one that is searched for.
        listen: host:port or unix:/path, instead of the configured addresses; may be given several times.
    """
    for address in listen or ():
        try:
            configuration.parse_listen(address)
        except ValueError as error:
            raise InvalidRequest(f"--listen: {error}") from error

    def placed(settings: configuration.Settings) -> configuration.Settings:
        return replace(settings, server=replace(settings.server, listen=listen)) if listen else settings

    settings = placed(configuration.read(config, KEYS))
    from mlxsup.daemon import server  # only now: a wrong flag should not wait for its imports

    return server.serve(settings, lambda: placed(configuration.reread(settings.source, KEYS)))
