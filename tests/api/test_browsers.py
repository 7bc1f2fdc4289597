"""Which web pages may use the API: those of this machine and those that are configured; a browser sends what a page likes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from mlxsup.api import connections

from .serving import served

pytestmark = pytest.mark.anyio

EVIL = "http://evil.example"
LOAD = b'{"model": "m"}'


async def load(http: aiohttp.ClientSession, **headers: str) -> tuple[int, str]:
    """What a page can send without its browser asking first: text."""
    named = {name.replace("_", "-"): value for name, value in {"Content_Type": "text/plain", **headers}.items()}
    async with http.post("/models/load", data=LOAD, headers=named) as answer:
        body = await answer.json()
        return answer.status, body["error"]["message"] if answer.status != 200 else ""


@pytest.fixture
def loopback() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:11435",
        "localhost.:1",
        "ai.localhost",
        "127.0.0.1",
        "127.8.8.8:1",
        "[::1]:1",
        "10.1.2.3",
        "host.docker.internal:11435",
        "mac.local",
        "mlxsup_backend",
        "localhost.localdomain",
        socket.gethostname(),
        "",
    ],
)
async def test_by_a_name_or_an_address_of_this_machine_all_may(loopback: socket.socket, host: str) -> None:
    async with served(loopback) as http:
        assert await load(http, Host=host) == (200, "")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:11435",
        "localhost.evil.example",
        "internal.evil.example",
        "127.evil.example",
        "localhost@evil.example",
        "[x",
    ],
)
async def test_a_name_that_was_made_to_mean_this_machine_is_refused(loopback: socket.socket, host: str) -> None:
    async with served(loopback) as http:
        status, message = await load(http, Host=host, Origin=f"http://{host}")
        assert (status, "is no name of this machine" in message) == (403, True)
        async with http.get("/models", headers={"Host": host, "Origin": "http://localhost:1"}) as answer:
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "forbidden")
            assert "x-request-id" in answer.headers
        assert await load(http) == (200, "")


async def test_the_name_that_it_listens_on_is_one_of_this_machine(loopback: socket.socket) -> None:
    async with served(loopback, listen=["MyBox:11435"]) as http:
        assert await load(http, Host="mybox:11435", Origin="http://mybox:11435") == (200, "")


async def test_whose_address_others_reach_may_be_called_anything(
    loopback: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests listen on this machine alone, so the listener is said to be another."""
    monkeypatch.setattr(connections, "_is_loopback", lambda _: False)
    async with served(loopback) as http:
        assert await load(http, Host="ai.example") == (200, "")
        assert await load(http, Host="ai.example", Origin="https://ai.example") == (200, "")
        assert (await load(http, Host="ai.example", Origin=EVIL))[0] == 403
        beside = {"Host": "ai.example:11435", "Origin": "https://ai.example:8443"}
        async with http.get("/models", headers=beside) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://ai.example:8443")


async def test_who_reaches_a_unix_socket_may_call_it_anything(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        async with served(listener) as http:
            assert await load(http) == (200, "")
            assert await load(http, Host="docker") == (200, "")


@pytest.mark.parametrize(
    "origin",
    [
        *(EVIL, "https://localhost.evil.example", "http://box.local", "null", "file://", "chrome-extension://abc"),
        *("http://[x", "app", "https://app://x", "http://10.0.0.1"),
    ],
)
async def test_pages_of_strangers_are_refused(loopback: socket.socket, origin: str) -> None:
    async with served(loopback) as http:
        status, message = await load(http, Origin=origin)
        assert (status, "server.origins" in message) == (403, True)
        assert (await load(http, Origin=origin, Sec_Fetch_Site="cross-site"))[0] == 403
        assert (await load(http, Origin=origin, Host=""))[0] == 403
        async with http.get("/models") as answer:
            assert (await answer.json())["data"][0]["status"]["value"] == "unloaded"


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost:3000", "http://ai.localhost", "http://127.0.0.1", "https://[::1]:8"),
        *("tauri://localhost", "app://obsidian.md", "vscode-webview://0abc"),
    ],
)
async def test_pages_of_this_machine_may_and_see_the_answer(loopback: socket.socket, origin: str) -> None:
    async with served(loopback) as http:
        assert await load(http, Origin=origin) == (200, "")
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        async with http.options("/completion", headers=asks) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, origin)
        async with http.get("/models", headers={"Origin": origin}) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == origin


async def test_a_page_behind_a_proxy_that_changes_the_host_is_known_by_its_browser(loopback: socket.socket) -> None:
    async with served(loopback) as http:
        assert await load(http, Origin="https://ai.example", Sec_Fetch_Site="same-origin") == (200, "")


async def test_pages_that_are_configured_may_and_see_the_answer(loopback: socket.socket) -> None:
    async with served(loopback, origins=["https://AI.example:443/", "http://other.example:8080"]) as http:
        asks = {
            "Origin": "https://ai.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        async with http.options("/completion", headers=asks) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == "https://ai.example"
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
            assert answer.headers["Access-Control-Allow-Headers"] == "content-type"
        body = {"model": "m", "prompt": "p"}
        async with http.post("/completion", json=body, headers={"Origin": "https://ai.example"}) as answer:
            assert answer.status == 200
            assert answer.headers["Access-Control-Allow-Origin"] == "https://ai.example"
            assert answer.headers["Vary"] == "Origin"
            await answer.read()
        assert await load(http, Host="ai.example", Origin="https://ai.example") == (200, "")
        assert (await load(http, Origin="http://other.example"))[0] == 403
        async with http.options("/completion", headers={**asks, "Origin": EVIL}) as answer:
            assert answer.status == 403
            assert "Access-Control-Allow-Origin" not in answer.headers
        async with http.options("/completion", headers={"Origin": "https://ai.example"}) as answer:
            assert answer.status == 405


async def test_a_star_lets_all_pages_in(loopback: socket.socket) -> None:
    async with served(loopback, origins=["*"]) as http:
        assert await load(http, Host="evil.example", Origin="null") == (200, "")
