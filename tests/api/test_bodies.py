"""Request bodies: bounded, and with one line that names what is wrong in them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import anyio
import psutil
import pytest

from mlxsup.api.bodies import decode
from mlxsup.api.native import CompletionBody
from mlxsup.errors import InvalidRequest
from mlxsup.testing import fake_runner
from tests.waiting import LIMIT

from .serving import served, serving

HUGE = 100_000_000
LOAD = b'{"model": "m"}'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; it must be a JSON object"),
        (b" \n", "the body is empty; it must be a JSON object"),
        (b"{", "the body is not JSON: Input data was truncated"),
        (b"{]", "the body is not JSON: object keys must be strings (byte 1)"),
        (b"\xff", "the body is not JSON: invalid character (byte 0)"),
        (b"[]", "the body: expected a JSON object, got array"),
        (b"[" * 100_000, "the body: expected a JSON object, got array"),
        (b'{"prompt": "p"}', "model: missing"),
        (b'{"model": "m"}', "prompt: missing"),
        (b'{"model": "m", "prompt": 3}', "prompt: expected str, got int"),
        (b'{"model": "m", "prompt": "p", "stps": 3}', "stps: unknown key, did you mean steps?"),
        (b'{"model": "m", "prompt": "p", "zzz": 3}', "zzz: unknown key"),
        (b'{"model": "m", "prompt": "p", "steps": 1.5}', "steps: expected int or null, got float"),
        (b'{"model": "m", "prompt": "p", "options": {"topk": 1}}', "options.topk: unknown key"),
        (b'{"model": "m", "prompt": "p", "options": {"stop": [1]}}', "options.stop[0]: expected str, got int"),
        (b'{"model": "m", "prompt": "p", "images": ["%"]}', "images[0]: invalid base64 encoded string"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(body, CompletionBody)
    assert caught.value.message == message


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the body is not JSON"):
        decode(b'{"model": "m", "prompt": "\xff"}', CompletionBody)


@pytest.mark.anyio
async def test_the_content_type_does_not_matter() -> None:
    async with serving({"m": fake_runner("tokens=1")}) as api:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
            status, _ = await api.post("/models/load", b'{"model": "m"}', **{"Content-Type": kind})
            assert status == 200


@pytest.mark.anyio
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_100_mb_is_refused_without_being_held(chunked: bool) -> None:
    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(HUGE // 1_000_000):
            yield bytes(1_000_000)

    async with serving({"m": fake_runner()}, max_body="1MiB") as api:
        before = psutil.Process().memory_info().rss
        headers = {} if chunked else {"Content-Length": str(HUGE)}
        with anyio.fail_after(LIMIT):
            async with api.http.post("/completion", data=blocks(), headers=headers) as answer:
                assert answer.status == 413
                error = (await answer.json())["error"]
                assert error["code"] == "body_too_large"
                assert error["message"] == "the body is larger than 1 MiB, the limit that server.max_body sets"
        assert psutil.Process().memory_info().rss - before < 40_000_000
        assert (await api.get("/health"))[0] == 200


@pytest.mark.anyio
async def test_a_client_that_asks_first_is_refused_before_it_sends() -> None:
    async with serving({"m": fake_runner()}, max_body="1KiB") as api:
        refused = await _ask_first(api.port, HUGE, b"")
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_large" in refused
        welcome = await _ask_first(api.port, 14, b'{"model": "m"}')
        assert welcome.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
        assert b'{"success":true}' in welcome


@pytest.mark.anyio
@pytest.mark.parametrize("packed", ["gzip", "deflate", "br", "gzip, identity"])
async def test_a_packed_body_is_refused_and_not_unpacked(packed: str) -> None:
    """A few bytes may become gigabytes. These are no brotli, so whoever unpacks them complains."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with served(listener) as http:
            headers = {"Content-Encoding": packed}
            async with http.post("/models/load", data=LOAD, headers=headers) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (415, "unsupported_media_type")
            headers = {"Content-Encoding": "identity"}
            async with http.post("/models/load", data=LOAD, headers=headers) as answer:
                assert answer.status == 200


@pytest.mark.anyio
async def test_an_error_may_follow_the_word_to_continue() -> None:
    async with serving({"m": fake_runner()}) as api:
        answer = await _ask_first(api.port, 2, b"{}")
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 ")


async def _ask_first(port: int, length: int, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /models/load HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: {length}"
    writer.write(head.encode() + b"\r\n\r\n")
    with anyio.fail_after(LIMIT):
        answer = await reader.readuntil(b"\r\n\r\n")
        if body:
            writer.write(body)
            answer += await reader.read()
        else:
            answer += await reader.readuntil(b"}}")
    writer.close()
    await writer.wait_closed()
    return answer


async def test_long_names_are_told_again_in_part() -> None:
    """Each of them is looked for among the known ones, on the loop."""
    async with serving({"m": fake_runner()}) as api:
        for body in ({"model": "m" * 900_000}, {"model": "m", "k" * 900_000: 1}):
            status, answer = await api.post("/models/load", body)
            assert status in (400, 404)
            assert len(str(answer)) < 2000
