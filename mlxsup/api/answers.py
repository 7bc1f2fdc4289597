"""How an answer looks, whatever its dialect: JSON, NDJSON streams, errors, and the request id that every answer carries."""

from __future__ import annotations

import functools
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
import orjson
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from mlxsup.completion import Completion
from mlxsup.errors import DoesNotFit, LoadFailed, MlxsupError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Routes = Iterable[tuple[str, str, Handler]]
"""What a dialect offers: method, path, handler."""

_log = logging.getLogger("mlxsup.api")
_request_id = web.RequestKey("mlxsup_request_id", str)
_sane_id = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def json_response(request: web.Request, value: object, *, status: int = 200) -> web.Response:
    """Answer with a struct, or with a dict of structs, as JSON."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"x-request-id": request_id(request)},
    )


def error_response(
    request: web.Request, error: MlxsupError, *, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer with an error: its status, its body, and the headers that tell a client whether to come back."""
    response = web.Response(
        status=error.status,
        body=orjson.dumps({"error": error_object(error)}, default=str),
        content_type="application/json",
        headers={"x-request-id": request_id(request), **(headers or {})},
    )
    if error.retry_after is not None:
        response.headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, (DoesNotFit, LoadFailed)):
        response.headers["x-should-retry"] = "false" if error.retry_after is None else "true"
    return response


def error_object(error: MlxsupError) -> dict[str, Any]:
    """Return the `error` of a body: OpenAI's four keys, who failed, and what programs may want to know."""
    found = {
        "message": error.message,
        "type": _error_type(error.status),
        "param": error.details.get("param"),
        "code": error.code,
        "src": error.source,
        "status": error.status,
    }
    if error.retry_after is not None:
        found["retry_after"] = error.retry_after
    if error.details:
        found["details"] = error.details
    return found


async def stream_ndjson(request: web.Request, work: Completion) -> web.StreamResponse:
    """Answer with the runner's own lines as they come; a failure on the way is a last line of its own.

    A slow reader slows the runner down; one that leaves ends the stream quietly.
    """
    response = web.StreamResponse(
        headers={
            hdrs.CONTENT_TYPE: "application/x-ndjson",
            "x-request-id": request_id(request),
            "mlxsup-seed": str(work.request.seed),
        }
    )
    try:
        client = _Client(request, response, await response.prepare(request))
        try:
            while await work.pass_on(client.take):
                await client.catch_up()
        except ConnectionResetError:
            raise
        except Exception as error:  # noqa: BLE001 - what is not expected is logged with its traceback
            client.take(_error_line(_told(request, error), after=client.last))
        await client.catch_up()
        await response.write_eof()
    except ConnectionResetError:
        _log.info("the client left in the middle of its answer", extra={"request_id": request_id(request)})
    return response


def request_id(request: web.Request) -> str:
    """Return the id that the client chose, if it is a sane one, else one of ours; the same at every call."""
    if _request_id not in request:
        offered = request.headers.get("x-request-id", "")
        request[_request_id] = offered if _sane_id.fullmatch(offered) else f"req-{secrets.token_hex(8)}"
    return request[_request_id]


def guarded(handler: Handler) -> Handler:
    """Wrap a handler so that whatever it raises becomes an error answer, and every request leaves a line in the log."""

    @functools.wraps(handler)
    async def guard(request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        try:
            response = await handler(request)
        except MlxsupError as error:
            response = error_response(request, error)
            _note(request, error.status, began, code=error.code, error=error.message)
        except ConnectionError:  # while its body was read: nobody is left to answer
            response = web.Response(status=499)
            _note(request, response.status, began)
        except Exception:  # noqa: BLE001 - logged with its traceback, and the client is told
            response = error_response(request, unexpected(request))
            _note(request, response.status, began)
        except BaseException:
            _note(request, 499, began)
            raise
        else:
            _note(request, response.status, began)
        return response

    return guard


def unexpected(request: web.Request) -> MlxsupError:
    """Log the exception that is being handled with its traceback; return what the client may know of it."""
    _log.exception(
        "unexpected failure of %s %s", request.method, request.path, extra={"request_id": request_id(request)}
    )
    return MlxsupError(f"internal error; the log has it under request id {request_id(request)}")


class _Client:
    """Where an answer goes, in many small blocks: past aiohttp's layers where the bytes need no more than their frame.

    `last` is the last byte.
    """

    def __init__(self, request: web.Request, response: web.StreamResponse, writer: AbstractStreamWriter | None) -> None:
        assert writer is not None
        self.last = b"\n"
        self._writer = writer
        self._held = b""
        framed = response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"  # not so for HTTP/1.0
        self._transport = request.transport if framed else None

    def take(self, block: bytes) -> bool:
        """Write a block; tells whether all is sent and more may come, else `catch_up` must be awaited."""
        self.last = block[-1:]
        transport = self._transport
        if transport is None or transport.is_closing():
            self._held += block
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(block), block))
        self._writer.output_size += len(block)
        return transport.get_write_buffer_size() == 0

    async def catch_up(self) -> None:
        """Wait until the client has taken what was written.

        Raises:
            ConnectionResetError: it has left.
        """
        if self._held:
            held, self._held = self._held, b""
            await self._writer.write(held)
        await self._writer.drain()


def _told(request: web.Request, error: Exception) -> MlxsupError:
    """Log why a stream ends early, and return what its client is told."""
    if not isinstance(error, MlxsupError):
        return unexpected(request)
    _log.warning(error.message, extra={"code": error.code, "request_id": request_id(request)})
    return error


def _error_line(error: MlxsupError, *, after: bytes) -> bytes:
    """The last line of a stream that failed; one that failed within a line ends that line first."""
    line = orjson.dumps({"error": error_object(error), "done": True}, default=str) + b"\n"
    return line if after == b"\n" else b"\n" + line


def _note(request: web.Request, status: int, began: float, **facts: object) -> None:
    quiet = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)  # somebody looks, maybe every second
    facts |= {"status": status, "seconds": round(time.monotonic() - began, 4), "request_id": request_id(request)}
    _log.log(logging.DEBUG if quiet else logging.INFO, "%s %s", request.method, request.path, extra=facts)


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")
