"""Reads request bodies: bounded in memory, decoded into typed structs, with messages that name the key at fault."""

from __future__ import annotations

import difflib
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from mlxsup.api.answers import error_response
from mlxsup.errors import BodyTooLarge, InvalidRequest

S = TypeVar("S", bound=msgspec.Struct)

_place = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)
_unknown = re.compile(r"Object contains unknown field `(.*)`")
_missing = re.compile(r"Object missing required field `(.*)`")
_wrong_type = re.compile(r"Expected `(.*)`, got `(.*)`")


async def read_body(request: web.Request, kind: type[S], limit: int) -> S:
    """Read and decode a JSON body; its content type does not matter.

    Raises:
        BodyTooLarge: more than `limit` bytes; no more than that is ever held.
        InvalidRequest: not JSON, or not a `kind`.
    """
    _refuse_announced(request, limit)
    body = bytearray()
    try:
        async for part in request.content.iter_any():
            body += part
            if len(body) > limit:
                raise _too_large(limit)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequest(f"the body cannot be read: {' '.join(str(error).split())}") from error
    return decode(body, kind)


def decode(body: bytes | bytearray, kind: type[S]) -> S:
    """Decode JSON into a struct.

    Raises:
        InvalidRequest: with one line that names the key, and the key as `param` in its details.
    """
    if not body or body.isspace():
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None


def refuse_unread(limit: int) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    """Return a handler for `Expect: 100-continue` that refuses a body too large before it is sent."""

    async def expect(request: web.Request) -> web.StreamResponse | None:
        try:
            _refuse_announced(request, limit)
        except BodyTooLarge as error:
            return error_response(request, error)
        if request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # an interim answer is none: an error may still follow
        return None

    return expect


def _refuse_announced(request: web.Request, limit: int) -> None:
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BodyTooLarge:
    size = f"{limit / 2**20:g} MiB" if limit >= 2**20 else f"{limit} bytes"
    return BodyTooLarge(f"the body is larger than {size}, the limit that server.max_body sets")


def _named(reason: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    found = _place.fullmatch(reason)
    what, where = (found["what"], found["where"] or "") if found else (reason, "")
    if match := _unknown.fullmatch(what):
        close = [] if where else difflib.get_close_matches(match[1], kind.__struct_fields__, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        return _at(where, match[1], f"unknown key{hint}")
    if match := _missing.fullmatch(what):
        return _at(where, match[1], "missing")
    if match := _wrong_type.fullmatch(what):
        expected = match[1].replace("object", "a JSON object").replace(" | ", " or ")
        what = f"expected {expected}, got {match[2]}"
    else:
        what = what[:1].lower() + what[1:]
    return _at(where, "", what) if where else InvalidRequest(f"the body: {what}")


def _at(where: str, key: str, problem: str) -> InvalidRequest:
    path = ".".join(filter(None, (where, key)))
    return InvalidRequest(f"{path}: {problem}", details={"param": path})
