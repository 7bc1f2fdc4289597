"""The API inside somebody else's application."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from mlxsup.api import mount
from mlxsup.testing import fake_runner

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


async def test_two_supervisors_in_one_application() -> None:
    app = web.Application()
    async with supervisor({"a": fake_runner()}) as one, supervisor({"b": fake_runner()}) as two:
        mount(app, one, "/one")
        mount(app, two, "/two")
        async with listening(app) as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            for prefix, model in (("/one", "a"), ("/two", "b")):
                async with http.get(f"{prefix}/models") as answer:
                    assert [entry["id"] for entry in (await answer.json())["data"]] == [model]
