"""What a runner says instead of an answer reaches the caller: its own words, trimmed, with its own status."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec
import pytest

from mlxsup.engines import Address
from mlxsup.errors import BadAnswer, InvalidRequest, Loading, MlxsupError, QueueFull, RunnerError, UnsupportedParameter
from mlxsup.protocol import CompletionRequest
from mlxsup.runners.probe import open_session
from mlxsup.runners.refusals import MAX_MESSAGE, runner_refusal, stream_error
from mlxsup.runners.relay import Limits, post_completion

from .wire_server import LAST_WORDS, Exchange, Wire, saying, serving, wire

LARGE = 10 << 20


def answering(status: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def refusal(far: Wire) -> MlxsupError:
    with pytest.raises(MlxsupError) as caught:
        await far.post()
    assert caught.value.details["last_words"] == LAST_WORDS
    return caught.value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"code":"x","message":" no such size "}}', "no such size"),
        (b'{"error":{"message":"no such size"}}', "no such size"),
        (b'{"error":"no such size"}', "no such size"),
        (b'{"message":"no such size"}', "no such size"),
        (b"no such size\n", "no such size"),
        (b"<html>no such size</html>", "<html>no such size</html>"),
        (b"", "the runner answered 400 without a word"),
        (b" \n ", "the runner answered 400 without a word"),
        (b'{"error":""}', "the runner answered 400 without a word"),
        (b'["no such size"]', '["no such size"]'),
        (b'{"error":{}}', '{"error":{}}'),
        (b'{"error":null}', '{"error":null}'),
        (b'{"error":["no such size"]}', '{"error":["no such size"]}'),
        (b'{"error":{"message":null}}', '{"error":{"message":null}}'),
        (b'{"detail":"no such size"}', '{"detail":"no such size"}'),
        (b"caf\xe9", "caf\ufffd"),
        (b'{"error":"caf\xe9"}', "caf\ufffd"),
        (b"[" * 60_000, ("[" * 60_000)[:MAX_MESSAGE]),
        (b"x" * (MAX_MESSAGE + 9), "x" * MAX_MESSAGE),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_the_message_is_the_runners_own(body: bytes, message: str) -> None:
    error = runner_refusal(400, body)
    assert type(error) is RunnerError
    assert (error.message, error.status) == (message, 400)
    assert error.details["runner_status"] == 400


@pytest.mark.parametrize(
    ("status", "shown"),
    [(400, 400), (404, 404), (429, 429), (500, 500), (503, 503), (599, 599), (204, 502), (302, 502), (600, 502)],
)
def test_the_status_is_the_runners_own_where_it_is_one_of_an_error(status: int, shown: int) -> None:
    assert runner_refusal(status, b"no").status == shown


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", InvalidRequest),
        ("unsupported_parameter", UnsupportedParameter),
        ("loading", Loading),
        ("queue_full", QueueFull),
        ("runner_error", RunnerError),
        ("made_up", RunnerError),
        (None, RunnerError),
        (7, RunnerError),
    ],
)
def test_a_code_of_ours_becomes_its_class(code: object, kind: type[MlxsupError]) -> None:
    error = runner_refusal(422, msgspec.json.encode({"error": {"code": code, "message": "no"}}))
    assert type(error) is kind
    assert (error.message, error.status) == ("no", 422)


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("99999999999999999999", 86_400.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Fri, 31 Dec 9999 23:59:59", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("\u00b2", None),
        (None, None),
    ],
)
def test_when_to_come_back_is_the_runners_own(told: str | None, seconds: float | None) -> None:
    assert runner_refusal(429, b"no", told).retry_after == seconds


def test_a_date_to_come_back_at_is_seconds_from_now() -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    seconds = runner_refusal(503, b"no", when).retry_after
    assert seconds is not None
    assert 80 < seconds <= 100


@pytest.mark.parametrize(
    ("error", "kind", "message", "status"),
    [
        ("boom", RunnerError, "boom", 500),
        ({"message": " boom ", "code": "x"}, RunnerError, "boom", 500),
        ({"message": "boom", "code": "queue_full"}, QueueFull, "boom", 503),
        ({"message": "boom", "code": "invalid_request", "status": 422}, InvalidRequest, "boom", 422),
        ({"message": "boom", "status": 507}, RunnerError, "boom", 507),
        ({"message": "boom", "status": 200}, RunnerError, "boom", 500),
        ({"message": "boom", "status": "bad"}, RunnerError, "boom", 500),
        ({"reason": "boom"}, RunnerError, '{"reason":"boom"}', 500),
        (["boom"], RunnerError, '["boom"]', 500),
        (True, RunnerError, "true", 500),
        (" ", RunnerError, "the runner reports an error without a word", 500),
        ("x" * (MAX_MESSAGE + 9), RunnerError, "x" * MAX_MESSAGE, 500),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_error_in_a_line_becomes_what_it_says(
    error: object, kind: type[MlxsupError], message: str, status: int
) -> None:
    found = stream_error(msgspec.json.encode({"error": error, "done": True}))
    assert found is not None
    assert (type(found), found.message, found.status) == (kind, message, status)


@pytest.mark.parametrize(
    "line",
    [
        b'{"content":"a"}',
        b'{"error":null}',
        b'{"error":""}',
        b'{"error":false,"content":"a"}',
        b'{"content":"error"}',
        b'{"content":"{\\"error\\":\\"boom\\"}"}',
        b'{"error":',
    ],
)
def test_a_line_without_an_error_is_none(line: bytes) -> None:
    assert stream_error(line) is None


async def test_when_to_come_back_comes_through_a_real_connection() -> None:
    async with wire(saying(answering(b"429 Too Many Requests", b"later", b"retry-after: 12"))) as far:
        error = await refusal(far)
    assert (error.status, error.retry_after) == (429, 12.0)


async def test_it_comes_through_a_real_connection() -> None:
    body = b'{"error":{"code":"invalid_request","message":"width must be a multiple of 8: 248 or 256"}}'
    async with wire(saying(answering(b"400 Bad Request", body))) as far:
        error = await refusal(far)
    assert type(error) is InvalidRequest
    assert error.message == "width must be a multiple of 8: 248 or 256"
    assert far.blamed == []


async def test_a_body_that_is_cut_is_blamed_on_the_runner() -> None:
    told = b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\nhalf"
    async with wire(saying(told)) as far:
        assert isinstance(await refusal(far), BadAnswer)
    assert len(far.blamed) == 1


async def test_an_endless_body_is_read_only_so_far() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % LARGE)
        for _ in range(LARGE // 65536):
            await exchange.send(b"x" * 65536)
        await exchange.client_left()

    async with wire(answer) as far, asyncio.timeout(10):
        error = await refusal(far)
    assert error.message == "x" * MAX_MESSAGE


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"SSH-2.0-x\r\n",
    ],
    ids=["nothing", "garbage", "status", "header", "ssh"],
)
async def test_what_is_no_http_is_blamed_on_the_runner(told: bytes) -> None:
    async with wire(saying(told)) as far:
        assert isinstance(await refusal(far), BadAnswer)
    assert len(far.blamed) == 1


async def test_nobody_there() -> None:
    address = Address(socket="/nowhere/s")
    async with open_session(address, 5) as session:
        far = Wire(address, session)
        assert isinstance(await refusal(far), BadAnswer)
    assert "did not take the request" in far.blamed[0]


@pytest.mark.parametrize("status", [b"302 Found", b"307 Temporary Redirect", b"308 Permanent Redirect"])
async def test_a_redirect_is_not_followed(status: bytes) -> None:
    """A runner could otherwise send prompts and pictures to any host."""
    elsewhere: list[bytes] = []

    async def away(exchange: Exchange) -> None:
        elsewhere.append(exchange.head)
        await exchange.send(answering(b"200 OK", b'{"done":true}\n'))

    async with serving(away, unix=False) as other:
        where = b"Location: %b/completion" % other.base_url.encode()
        async with wire(saying(answering(status, b"", where)), unix=False) as far:
            error = await refusal(far)
    assert isinstance(error, RunnerError)
    assert error.status == 502
    assert elsewhere == []


async def test_a_runner_that_takes_no_connection_is_not_said_to_be_slow() -> None:
    """The limit to connect is another one than the limit for the first chunk, and the error names the right one."""
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):  # fills the backlog: the next connection gets no answer
            filler = opened.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        address = Address(port=port)
        async with open_session(address, 0.3) as session, asyncio.timeout(10):
            far = Wire(address, session)
            with pytest.raises(MlxsupError) as caught:
                await post_completion(
                    session,
                    f"{address.base_url}/completion",
                    CompletionRequest(prompt="p"),
                    Limits(first_chunk=600, silence=60),
                    far,
                )
    assert "600" not in caught.value.message
