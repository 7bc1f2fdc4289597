"""The API inside somebody else's application."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from mlxsup.api import mount
from mlxsup.testing import fake_runner
from tests.waiting import until

from .serving import listening, supervisor

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("prefix", ["", "/ai", "/ai/"])
async def test_an_application_gets_our_routes_and_keeps_its_own(prefix: str) -> None:
    sup = supervisor({"m": fake_runner("tokens=1")}, max_body="1KiB")
    app = web.Application(client_max_size=10)

    async def mine(_: web.Request) -> web.Response:
        return web.Response(text="mine")

    async def supervising(_: web.Application) -> AsyncIterator[None]:
        async with sup:
            yield

    app.router.add_get("/mine", mine)
    app.cleanup_ctx.append(supervising)
    mount(app, sup, prefix)
    base = prefix.rstrip("/")
    async with listening(app) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        async with http.get("/mine") as answer:
            assert await answer.text() == "mine"
            assert "x-request-id" not in answer.headers
        async with http.get("/nowhere") as answer:
            assert (answer.status, answer.content_type) == (404, "text/plain")
        async with http.get(f"{base}/health") as answer:
            assert await answer.json() == {"status": "ok"}
        async with http.post(f"{base}/completion", json={"model": "m", "prompt": "p"}) as answer:
            assert json.loads((await answer.read()).splitlines()[-1])["done"]
        async with http.post(f"{base}/completion", json={"model": "none", "prompt": "p"}) as answer:
            assert (await answer.json())["error"]["code"] == "model_not_found"
        async with http.post(f"{base}/completion", data=bytes(2000)) as answer:
            assert answer.status == 413


async def test_a_client_that_leaves_is_no_failure_where_handlers_are_not_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mlxsup.api")
    body = b'{"model": "m", "prompt": "p"}'
    app = web.Application()
    async with supervisor(
        {"m": fake_runner("; ".join(f"big@{number}=1" for number in range(1, 60)) + "; tokens=99")}
    ) as sup:
        mount(app, sup)
        await sup.load("m")
        async with listening(app, handler_cancellation=False) as port:
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(
                    b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                await until(lambda: sup.report("m").leases == 1)
            await until(lambda: sup.report("m").leases == 0)
            await until(lambda: "the client left in the middle of its answer" in caplog.text)
    assert "unexpected failure" not in caplog.text


async def test_two_supervisors_in_one_application() -> None:
    app = web.Application()
    async with supervisor({"a": fake_runner()}) as one, supervisor({"b": fake_runner()}) as two:
        mount(app, one, "/one")
        mount(app, two, "/two")
        async with listening(app) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            for prefix, model in (("/one", "a"), ("/two", "b")):
                async with http.get(f"{prefix}/models") as answer:
                    assert [entry["id"] for entry in (await answer.json())["data"]] == [model]
