"""Puts the dialects together: one table of routes, as an application of its own or inside another one.

A dialect is a module with a `routes(sup)`; a new one is listed in `_DIALECTS` and nowhere else.
"""

from __future__ import annotations

from aiohttp import hdrs, web

from mlxsup.api import management, native
from mlxsup.api.answers import Handler, error_response, guarded
from mlxsup.api.bodies import refuse_unread
from mlxsup.api.browsers import keep_strangers_out
from mlxsup.errors import MlxsupError
from mlxsup.supervisor import Supervisor

_DIALECTS = (native.routes, management.routes)


class _NoSuchRoute(MlxsupError):
    code = "not_found"
    default_status = 404


class _WrongMethod(MlxsupError):
    code = "method_not_allowed"
    default_status = 405


def create_app(sup: Supervisor) -> web.Application:
    """Return an application that serves `sup` and nothing else.

    Serve it with `mlxsup.api.serving`, which is safe from clients that dawdle and from web pages whose name means this machine,
    or with `web.AppRunner(app, handler_cancellation=True, auto_decompress=False)`: without the first, a client that leaves
    before the first byte of its answer goes unnoticed and its work goes on; without the second, a small packed body keeps the
    loop busy until it is unpacked, and is refused only then. The supervisor is entered and left by the caller.
    """
    app = web.Application(middlewares=[_router_errors])
    keep_strangers_out(app, sup.settings.server)
    mount(app, sup)
    return app


def mount(app: web.Application, sup: Supervisor, prefix: str = "") -> None:
    """Add the routes of `sup` to somebody's application, below `prefix` ("/ai" makes it `/ai/completion`).

    Only these routes are touched: no middleware, no signal, and the body limit is the supervisor's own. The supervisor is
    entered and left by the caller, for example in a cleanup context of the application:

        async def supervising(app):
            async with sup:
                yield

        app.cleanup_ctx.append(supervising)

    The application's runner needs `handler_cancellation=True` and `auto_decompress=False`, see create_app. What concerns whole
    connections is the host's to limit, best by a proxy in front: clients that do not finish the head of a request or do not take
    their answer (`header_timeout` bounds the body alone here, `write_timeout` nothing), how many there are, and which web pages
    may ask (`origins`).
    """
    expect = refuse_unread(sup.settings.server.max_body)
    base = prefix.rstrip("/")
    for dialect in _DIALECTS:
        for method, path, handler in dialect(sup):
            if method == hdrs.METH_GET:
                app.router.add_get(base + path, guarded(handler))
            else:
                app.router.add_route(method, base + path, guarded(handler), expect_handler=expect)


@web.middleware
async def _router_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give what the router itself refuses the same shape as every other error."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as refusal:
        allowed = ", ".join(sorted(refusal.allowed_methods))
        error = _WrongMethod(f"{request.path} takes {allowed}, not {request.method}")
        return error_response(request, error, headers={hdrs.ALLOW: allowed})
    except web.HTTPNotFound:
        return error_response(request, _NoSuchRoute(f"there is no {request.path} here"))
