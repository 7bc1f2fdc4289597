"""Headers of a request that mean something here."""

from __future__ import annotations

from aiohttp import web

from mlxsup import terms

DEADLINE = "mlxsup-deadline"
"""Bounds the request, from when it was read: seconds, or text such as `30s`."""


def deadline(request: web.Request) -> float | None:
    """Return the seconds that the request may take, None where it does not say.

    Raises:
        InvalidRequest: what it says is no span of time.
    """
    return terms.deadline(request.headers.get(DEADLINE), DEADLINE)
