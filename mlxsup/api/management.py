"""Loading and unloading, in the words of llama.cpp's router: `GET /models`, `POST /models/load`, `POST /models/unload`."""

from __future__ import annotations

from typing import Literal

import msgspec
from aiohttp import web

from mlxsup.api import headers
from mlxsup.api.answers import Routes, json_response
from mlxsup.api.bodies import read_body
from mlxsup.report import RunnerReport, State
from mlxsup.supervisor import Supervisor

RouterState = Literal["unloaded", "loading", "loaded", "unloading"]

_ROUTER_STATES: dict[State, RouterState] = {
    "stopped": "unloaded",
    "backoff": "unloaded",
    "failed": "unloaded",
    "starting": "loading",
    "ready": "loaded",
    "draining": "unloading",
    "stopping": "unloading",
    "stuck": "unloading",
}


def routes(sup: Supervisor) -> Routes:
    """Return the routes of this dialect."""
    management = _Management(sup)
    return (
        ("GET", "/models", management.models),
        ("POST", "/models/load", management.load),
        ("POST", "/models/unload", management.unload),
    )


class LoadBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /models/load`; `keep_alive` is seconds or text such as `"5m"`, as for a completion."""

    model: str
    keep_alive: float | str | None = None


class UnloadBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /models/unload`; `force` does not wait for work in flight."""

    model: str
    force: bool = False


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's state as the router's clients know it (`value`), and in our own words (`state`)."""

    value: RouterState
    state: State
    failed: bool = False
    exit_code: int | None = None
    progress: float | None = None

    @classmethod
    def of(cls, report: RunnerReport) -> ModelStatus:
        """Translate a report."""
        return cls(
            value=_ROUTER_STATES[report.state],
            state=report.state,
            failed=report.state in ("backoff", "failed"),
            exit_code=report.exit_code,
            progress=report.progress,
        )


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One configured model in the list."""

    id: str
    object: str
    owned_by: str
    path: str
    aliases: list[str]
    status: ModelStatus

    @classmethod
    def of(cls, report: RunnerReport) -> ModelEntry:
        """Translate a report."""
        return cls(
            id=report.model,
            object="model",
            owned_by="mlxsup",
            path=report.path,
            aliases=report.aliases,
            status=ModelStatus.of(report),
        )


class _Management:
    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup
        self._settings = sup.settings.server

    async def models(self, request: web.Request) -> web.StreamResponse:
        entries = [ModelEntry.of(report) for report in self._sup.status().runners]
        return json_response(request, {"object": "list", "data": entries})

    async def load(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, LoadBody, self._settings)
        await self._sup.load(body.model, deadline=headers.deadline(request), keep_alive=body.keep_alive)
        return json_response(request, {"success": True})

    async def unload(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, UnloadBody, self._settings)
        await self._sup.unload(body.model, force=body.force, deadline=headers.deadline(request))
        return json_response(request, {"success": True})
