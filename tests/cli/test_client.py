"""The client of the command line against the API: what goes wrong there arrives here as what it was."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from mlxsup import errors
from mlxsup.cli.client import Client
from mlxsup.cli.failures import CommandFailed
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.testing import Gate, fake_runner
from tests.api.serving import Api, serving
from tests.waiting import LIMIT, until

pytestmark = pytest.mark.anyio

REQUEST = CompletionRequest(prompt="p", seed=3)


def _url(api: Api) -> str:
    return f"http://127.0.0.1:{api.port}"


async def _collect(client: Client, model: str = "m") -> list[CompletionChunk]:
    async with client.completion(model, REQUEST) as work:
        return [chunk async for chunk in work]


async def test_chunks_and_reports_arrive_as_the_library_gives_them() -> None:
    async with serving({"m": fake_runner("tokens=2")}) as api, Client(_url(api)) as client:
        assert await client.is_mlxsup(LIMIT)
        chunks = await _collect(client)
        assert [chunk.content for chunk in chunks] == ["t1 ", "t2 ", ""]
        assert (chunks[-1].done, chunks[-1].seed) == (True, 3)
        assert [report.model for report in await client.runners()] == ["m"]
        await client.unload("m")
        assert api.sup.report("m").state == "stopped"
        await client.load("m")
        assert api.sup.report("m").state == "ready"


async def test_errors_arrive_as_what_they_were_before_the_first_line_and_after_it() -> None:
    models = {
        "m": fake_runner("tokens=3; stderr@1=gone wrong; crash@1"),
        "broken": fake_runner("stderr=no weights; exit=3"),
        "picky": fake_runner("status=422:no"),
    }
    async with serving(models) as api, Client(_url(api)) as client:
        with pytest.raises(errors.RunnerDied) as died:
            await _collect(client)
        assert died.value.details["signal"] == "SIGKILL"
        assert (died.value.status, died.value.source) == (502, "runner")
        with pytest.raises(errors.LoadFailed) as failed:
            await _collect(client, "broken")
        assert failed.value.details["last_words"] == ["no weights"]
        with pytest.raises(errors.RunnerError) as refused:
            await _collect(client, "picky")
        assert refused.value.status == 422
        with pytest.raises(errors.ModelNotFound):
            await client.load("none")


@pytest.mark.parametrize(
    "kind", [errors.QueueFull, errors.DoesNotFit, errors.UnsupportedParameter, errors.ShuttingDown, errors.Stalled]
)
def test_every_code_is_its_class_again(kind: type[errors.MlxsupError]) -> None:
    from mlxsup.api.answers import error_object

    sent = kind("why", retry_after=2.5, details={"model": "m"})
    found = Client("http://x").error_from(error_object(sent))
    assert type(found) is kind
    assert (found.message, found.status, found.retry_after, found.details) == ("why", sent.status, 2.5, {"model": "m"})


def test_an_unknown_code_is_still_an_error_with_its_status() -> None:
    found = Client("http://x").error_from({"message": "new", "code": "from_the_future", "status": 418})
    assert (type(found), found.status, found.message) == (errors.MlxsupError, 418, "new")


async def test_leaving_early_ends_the_work() -> None:
    async with (
        Gate() as gate,
        serving({"m": fake_runner(f"tokens=9; gate@1={gate.path}")}) as api,
        Client(_url(api)) as client,
    ):
        async with client.completion("m", REQUEST) as work:
            async for chunk in work:
                assert chunk.content == "t1 "
                break
        with anyio.fail_after(LIMIT):
            await (await gate.arrival()).left()
        await until(lambda: api.sup.report("m").leases == 0)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", errors.BadAnswer, "ended before its last line"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"content":"a"}\n{"cont', errors.BadAnswer, "ended before its last line"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>\n", errors.BadAnswer, "is no chunk"),
        (b"HTTP/1.1 502 Bad\r\n\r\n<html>", errors.BadAnswer, "answered 502, but not as mlxsup does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", CommandFailed, "broke off"),
        (b"nonsense\r\n\r\n", CommandFailed, "broke off"),
        (b"", CommandFailed, "broke off"),
    ],
)
async def test_whatever_else_answers_is_an_error(answer: bytes, error: type[Exception], words: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server, Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(error, match=words):
            await _collect(client)


async def test_who_never_answers_is_no_mlxsup() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        assert not await client.is_mlxsup(0.05)
