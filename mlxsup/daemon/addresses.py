"""An address of the daemon, as people write it and as a client on this machine reaches it. Opens nothing."""

from __future__ import annotations

from mlxsup.config import Listen

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read here, not bound
"""What stands for all addresses of a kind, and how this machine itself is reached then."""
_LOOPBACK = ("127.", "::1", "localhost")


def written(listen: Listen) -> str:
    """Write an address as the configuration has it: `host:port`, `[IPv6]:port` or `unix:/path`."""
    if listen.path:
        return f"unix:{listen.path}"
    return f"[{listen.host}]:{listen.port}" if ":" in listen.host else f"{listen.host}:{listen.port}"


def local_url(listen: Listen) -> str:
    """Say where a client on this machine finds it: `http://host:port` or `unix:/path`."""
    if listen.path:
        return f"unix:{listen.path}"
    return "http://" + written(Listen(host=WILDCARDS.get(listen.host, listen.host), port=listen.port))


def is_local(listen: Listen) -> bool:
    """Tell whether only this machine can reach it."""
    return bool(listen.path) or listen.host.startswith(_LOOPBACK)
