"""Our own dialect: health, version, `POST /completion` as NDJSON, and what the runners do."""

from __future__ import annotations

import msgspec
from aiohttp import web

from mlxsup._version import __version__
from mlxsup.api import headers
from mlxsup.api.answers import Handler, Routes, json_response, stream_ndjson
from mlxsup.api.bodies import read_body
from mlxsup.engines.base import Ability
from mlxsup.errors import NotSupported
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
        ("GET", "/explain", native.explain),
        *(("POST", f"/{ability}", native.refuse(ability)) for ability in _UNSUPPORTED),
    )


_UNSUPPORTED: tuple[Ability, ...] = ("embedding", "tokenize", "detokenize")
"""What clients of such servers ask for and no engine of ours can do yet: an honest 501."""


class ModelBody(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a body that says which model is meant."""

    model: str


class CompletionBody(CompletionRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /completion`: a CompletionRequest, the model it is for, and how long that shall stay after it."""

    model: str
    keep_alive: float | str | None = None

    def request(self) -> CompletionRequest:
        """Return the part that is meant for the runner."""
        return CompletionRequest(**{name: getattr(self, name) for name in CompletionRequest.__struct_fields__})


class _Native:
    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup
        self._settings = sup.settings.server

    async def health(self, request: web.Request) -> web.StreamResponse:
        if self._sup.status().closing:
            return json_response(request, {"status": "closing"}, status=503)
        return json_response(request, {"status": "ok"})

    async def version(self, request: web.Request) -> web.StreamResponse:
        return json_response(request, {"name": "mlxsup", "version": __version__})

    async def completion(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, CompletionBody, self._settings)
        bounded = headers.deadline(request)
        async with self._sup.completion(
            body.model, body.request(), deadline=bounded, keep_alive=body.keep_alive
        ) as work:
            await work.start()  # what fails before the first line has a status of its own
            return await stream_ndjson(request, work)

    async def runners(self, request: web.Request) -> web.StreamResponse:
        status = self._sup.status()
        return json_response(request, {"runners": status.runners, "devices": status.devices})

    async def explain(self, request: web.Request) -> web.StreamResponse:
        model = request.query.get("model", "")
        return json_response(request, {"model": model, "explanation": await self._sup.explain(model)})

    def refuse(self, ability: Ability) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            body = await read_body(request, ModelBody, self._settings)
            self._sup.require(body.model, ability)
            raise NotSupported(f"mlxsup does not pass {ability} on", details={"ability": ability})

        return handler
