"""Our own dialect: health, version, `POST /completion` as NDJSON, and what the runners do."""

from __future__ import annotations

from aiohttp import web

from mlxsup._version import __version__
from mlxsup.api.answers import Routes, json_response, stream_ndjson
from mlxsup.api.bodies import read_body
from mlxsup.protocol import CompletionRequest
from mlxsup.supervisor import Supervisor


def routes(sup: Supervisor) -> Routes:
    """Return the routes of this dialect."""
    native = _Native(sup)
    return (
        ("GET", "/health", native.health),
        ("GET", "/version", native.version),
        ("POST", "/completion", native.completion),
        ("GET", "/runners", native.runners),
    )


class CompletionBody(CompletionRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /completion`: a CompletionRequest and the model it is for."""

    model: str

    def request(self) -> CompletionRequest:
        """Return the part that is meant for the runner."""
        return CompletionRequest(**{name: getattr(self, name) for name in CompletionRequest.__struct_fields__})


class _Native:
    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup

    async def health(self, request: web.Request) -> web.StreamResponse:
        if self._sup.status().closing:
            return json_response(request, {"status": "closing"}, status=503)
        return json_response(request, {"status": "ok"})

    async def version(self, request: web.Request) -> web.StreamResponse:
        return json_response(request, {"name": "mlxsup", "version": __version__})

    async def completion(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, CompletionBody, self._sup.settings.server.max_body)
        async with self._sup.completion(body.model, body.request()) as work:
            await work.start()  # what fails before the first line has a status of its own
            return await stream_ndjson(request, work)

    async def runners(self, request: web.Request) -> web.StreamResponse:
        return json_response(request, {"runners": self._sup.status().runners})
