"""Reads request bodies: bounded in memory, decoded into typed structs, with messages that name the key at fault."""

from __future__ import annotations

import asyncio
import difflib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from mlxsup.api.answers import error_response
from mlxsup.config import ServerSettings
from mlxsup.errors import BodyTooLarge, InvalidRequest, MlxsupError

S = TypeVar("S", bound=msgspec.Struct)

_SLOWEST: Final = 8 * 1024
"""Bytes a second: a client that sends its body more slowly than that is left, however steadily it does."""

_SHOWN: Final = 100
"""Characters of an unknown key that are looked at and told again."""

_place = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)
_unknown = re.compile(r"Object contains unknown field `(.*)`")
_missing = re.compile(r"Object missing required field `(.*)`")
_wrong_type = re.compile(r"Expected `(.*)`, got `(.*)`")


class _BodyTooSlow(MlxsupError):
    code = "request_timeout"
    default_status = 408


class _Packed(MlxsupError):
    code = "unsupported_media_type"
    default_status = 415


async def read_body(request: web.Request, kind: type[S], settings: ServerSettings) -> S:
    """Read and decode a JSON body; its content type does not matter.

    Raises:
        BodyTooLarge: more than `max_body` bytes; no more than that is ever held.
        InvalidRequest: not JSON, or not a `kind`.
        MlxsupError: 415, it is packed; 408, the client was silent for `header_timeout` seconds, or is very slow.
    """
    limit, patience = settings.max_body, settings.header_timeout
    _refuse_head(request, limit)
    body = bytearray()
    began = time.monotonic()
    try:
        while True:
            slow = began + len(body) / _SLOWEST - time.monotonic()
            async with asyncio.timeout(patience + min(0.0, slow)):
                part = await request.content.readany()
            if not part:
                break
            body += part
            if len(body) > limit:
                raise _too_large(limit)
    except TimeoutError:
        raise _BodyTooSlow(f"the rest of the body did not come in time; {len(body)} bytes of it did") from None
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
    """Return a handler for `Expect: 100-continue` that refuses a body before it is sent: one too large or packed."""

    async def expect(request: web.Request) -> web.StreamResponse | None:
        try:
            _refuse_head(request, limit)
        except MlxsupError as error:
            return error_response(request, error)
        if request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # an interim answer is none: an error may still follow
        return None

    return expect


def _refuse_head(request: web.Request, limit: int) -> None:
    packed = request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
    if packed not in {"", "identity", "utf-8", "utf8"}:  # the last are charsets, which some put in the wrong header
        raise _Packed("the body must be sent as it is, without Content-Encoding")
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BodyTooLarge:
    size = f"{limit / 2**20:g} MiB" if limit >= 2**20 else f"{limit} bytes"
    return BodyTooLarge(f"the body is larger than {size}, the limit that server.max_body sets")


def _named(reason: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    found = _place.fullmatch(reason)
    what, where = (found["what"], found["where"] or "") if found else (reason, "")
    if match := _unknown.fullmatch(what):
        key = match[1][:_SHOWN]
        close = [] if where else difflib.get_close_matches(key, kind.__struct_fields__, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        return _at(where, key, f"unknown key{hint}")
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
