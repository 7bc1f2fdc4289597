"""Keeps strangers' web pages from the API: a browser sends their requests from this machine, where all is allowed.

A page of another origin gives itself away by its `Origin`; one whose name was made to mean this machine (DNS rebinding) by its `Host`.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from mlxsup.api.answers import Handler, error_response, request_id
from mlxsup.api.connections import Connection
from mlxsup.config import ServerSettings, parse_listen
from mlxsup.errors import Forbidden

_SHOWN: Final = 100
"""Characters of a header that are told again."""
_PREFLIGHT_AGE: Final = "600"
"""Seconds for which a browser need not ask again whether a page may use the API."""

_OWN: Final = (".localhost", ".local", ".internal")
"""Names that no name server of the internet knows: only one's own network can make them mean this machine (RFC 6761, RFC 6762,
ICANN's resolution of 2024-07-29). The same goes for names without a dot, as a proxy in front has them."""
_DOTLESS = re.compile(r"[a-z0-9_-]+")
_APPS: Final = ("app://", "tauri://", "vscode-file://", "vscode-webview://")
"""How origins begin of what is installed on this machine and shows pages of its own."""

_log = logging.getLogger("mlxsup.api")


def keep_strangers_out(app: web.Application, settings: ServerSettings) -> None:
    """Have an application refuse, with 403, web pages that are neither this machine's nor in `origins`; those see the answers, too.

    A request without `Origin` is no page's, or one that only looks. The `Host` counts on connections of `serving` where only this
    machine can connect: elsewhere name servers and proxies may call the daemon what they like.
    """
    door = _Door(settings)
    app.middlewares.append(door.let_in)
    app.on_response_prepare.append(door.let_read)


class _Door:
    def __init__(self, settings: ServerSettings) -> None:
        self._origins = frozenset(settings.origins)
        listens = (parse_listen(address).host.lower() for address in settings.listen)
        self._hosts = {*listens, *map(_host, self._origins), socket.gethostname().lower()}

    @web.middleware
    async def let_in(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            _log.info(refusal.message, extra={"code": refusal.code, "request_id": request_id(request)})
            return error_response(request, refusal)
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method == hdrs.METH_OPTIONS and asked and self._is_invited(request):
            return web.Response(
                status=204,
                headers={
                    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
                    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, ""),
                    hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_AGE,
                },
            )
        return await handler(request)

    async def let_read(self, request: web.Request, response: web.StreamResponse) -> None:
        """Allow a page that may ask to see the answer: of its own accord, its browser shows it none."""
        if response.status != Forbidden.default_status and self._is_invited(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = _origin(request)
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    def _is_invited(self, request: web.Request) -> bool:
        """Tell whether it is the request of a page that may ask: of a configured one, of this machine's or of the same host's."""
        origin, host = _origin(request), _named(request)
        known = origin in self._origins or "*" in self._origins or _is_local(origin)
        return bool(origin) and (known or (bool(host) and _host(origin) == host))

    def _refusal(self, request: web.Request) -> Forbidden | None:
        if "*" in self._origins:
            return None
        host = _named(request)
        inside = isinstance(request.protocol, Connection) and request.protocol.is_loopback
        if inside and host and not (host in self._hosts or _is_address(host) or _is_own_name(host)):
            name = host[:_SHOWN]
            return Forbidden(
                f"{name!r} is no name of this machine; ask for localhost, or, where a proxy or a name server calls it so, "
                f'add "http://{name}" to server.origins'
            )
        origin = _origin(request)
        if not origin or self._is_invited(request):
            return None
        if request.headers.get("Sec-Fetch-Site") == "same-origin":
            return None  # a proxy has put another Host in its place; no page can write a Sec- header
        return Forbidden(f"web pages of {origin[:_SHOWN]!r} may not use this API; server.origins lists those that may")


def _origin(request: web.Request) -> str:
    return request.headers.get(hdrs.ORIGIN, "").lower()


def _named(request: web.Request) -> str:
    """Return what the client calls this machine."""
    return _host(f"//{request.headers.get(hdrs.HOST, '')}")


def _host(url: str) -> str:
    """Return the host of a URL in small letters; "" for none, and what is no URL as it is."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return url


def _is_local(origin: str) -> bool:
    """Tell whether a page comes from this machine."""
    host = _host(origin)
    return (
        origin.startswith(_APPS)
        or host == "localhost"
        or host.endswith(".localhost")
        or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    )


def _is_own_name(host: str) -> bool:
    return host.endswith(_OWN) or host == "localhost.localdomain" or _DOTLESS.fullmatch(host) is not None


def _is_address(host: str) -> bool:
    """Tell whether it is an IP address: no name server can make that mean another machine."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
