"""A small client of the daemon: typed answers, and error bodies turned back into the errors they were made from."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

import aiohttp
import msgspec
import orjson

from mlxsup.cli.failures import CommandFailed
from mlxsup.errors import BadAnswer, InvalidRequest, MlxsupError, ModelNotFound
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.report import DeviceReport, RunnerReport

STATUS_LIMIT: Final = 10.0
"""Seconds in which a daemon answers what it has only to look up; loads and work take as long as it says."""

_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=2.0)
"""How long an answer may take is the daemon's to say; that it can be reached is quickly known."""


class _Explanation(msgspec.Struct):
    explanation: str


class Machine(msgspec.Struct):
    """What a daemon says of its runners and devices."""

    runners: list[RunnerReport]
    devices: list[DeviceReport] = []


class Client:
    """One daemon, by its URL: `http://host:port`, `host:port` or `unix:/path`.

    `found` says that nobody named this daemon: it happened to run; an unknown model is then explained with that.
    """

    def __init__(self, url: str, *, found: bool = False) -> None:
        self.url = url
        self._found = found
        self._path = url.removeprefix("unix:") if url.startswith("unix:") else ""
        self._base = "http://localhost" if self._path else _base(url)

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self._path) if self._path else aiohttp.TCPConnector()
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def is_mlxsup(self, timeout: float) -> bool:
        """Tell whether a mlxsup answers there, within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout), self._session.get(f"{self._base}/version") as response:
                answer = orjson.loads(await response.read())
        except (aiohttp.ClientError, OSError, ValueError):  # OSError: TimeoutError too
            return False
        return isinstance(answer, dict) and answer.get("name") == "mlxsup"

    async def greet(self) -> None:
        """Find out whether anybody answers at all, before the wait for what may take long.

        Raises:
            CommandFailed: nobody does, or not in time.
        """
        with contextlib.suppress(BadAnswer):  # what is asked next will say so
            await self._look_up("/version")

    def completion(
        self, model: str, request: CompletionRequest, *, keep_alive: float | None = None
    ) -> RemoteCompletion:
        """Return a completion that has not begun; it is both an async iterator and an async context manager."""
        return RemoteCompletion(self, model, request, keep_alive)

    async def load(self, model: str, *, keep_alive: float | None = None) -> None:
        """Load a model; return when it is ready."""
        await self._call("POST", "/models/load", {"model": model, **_kept(keep_alive)})

    async def unload(self, model: str, *, force: bool = False) -> None:
        """Unload a model; return when its process is gone."""
        await self._call("POST", "/models/unload", {"model": model, "force": force})

    async def runners(self) -> list[RunnerReport]:
        """Return what the daemon says of its runners."""
        return (await self.machine()).runners

    async def machine(self) -> Machine:
        """Return what the daemon says of its runners and devices."""
        body = await self._look_up("/runners")
        try:
            return msgspec.json.decode(body, type=Machine)
        except msgspec.DecodeError as error:
            raise BadAnswer(f"{self.url} answers, but not as mlxsup does: {error}") from error

    async def engine_of(self, model: str) -> str:
        """Return the kind of engine that serves a model, "" when the daemon has none of that name."""
        for report in await self.runners():
            if model == report.model or model in report.aliases:
                return report.engine
        return ""

    async def explain(self, model: str) -> str:
        """Return what the daemon says would happen if the model were asked for now."""
        body = await self._look_up(f"/explain?{urlencode({'model': model})}")
        try:
            return msgspec.json.decode(body, type=_Explanation).explanation
        except msgspec.DecodeError as error:
            raise BadAnswer(f"{self.url} answers, but not as mlxsup does: {error}") from error

    async def open(self, method: str, path: str, body: object = None) -> aiohttp.ClientResponse:
        """Send a request and return its answer, whose body is not read yet.

        Raises:
            CommandFailed: nothing answers.
            MlxsupError: the error that the daemon answered with.
        """
        data = None if body is None else orjson.dumps(body, default=msgspec.to_builtins)
        with self._explained():
            response = await self._session.request(method, f"{self._base}{path}", data=data)
            if response.status < 400:
                return response
            async with response:
                raise self._error(response.status, await response.read())

    def error_from(self, found: object, status: int = 500) -> MlxsupError:
        """Turn the `error` of a body back into the error that it was made from."""
        if not isinstance(found, dict) or not isinstance(found.get("message"), str):
            return BadAnswer(f"{self.url} answered {status}, but not as mlxsup does")
        details = found.get("details")
        message = found["message"]
        kind = _kinds().get(str(found.get("code")), MlxsupError)
        if kind is ModelNotFound and self._found:
            message += f" (asked the daemon at {self.url}; --local asks this machine's configuration instead)"
        return kind(
            message,
            status=found["status"] if isinstance(found.get("status"), int) else status,
            retry_after=found.get("retry_after"),
            details=details if isinstance(details, dict) else None,
        )

    async def _look_up(self, path: str) -> bytes:
        try:
            async with asyncio.timeout(STATUS_LIMIT):
                return await self._call("GET", path)
        except TimeoutError as error:
            raise CommandFailed(
                f"the daemon at {self.url} takes connections and gives no answer within {STATUS_LIMIT:g} s; it may be stopped"
                " or overloaded: see its log, or start it anew"
            ) from error

    async def _call(self, method: str, path: str, body: object = None) -> bytes:
        async with await self.open(method, path, body) as response:
            with self._explained():
                return await response.read()

    def _error(self, status: int, body: bytes) -> MlxsupError:
        try:
            answer = orjson.loads(body)
        except ValueError:
            answer = None
        return self.error_from(answer.get("error") if isinstance(answer, dict) else None, status)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise InvalidRequest(
                f"{self.url!r} is no address of a daemon; write http://host:port or unix:/path"
            ) from error
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
            raise CommandFailed(f"nothing answers at {self.url}; start the daemon with: mlxsup serve") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise CommandFailed(f"the daemon at {self.url} broke off: {str(error) or type(error).__name__}") from error


class RemoteCompletion:
    """A completion in a daemon. Leaving it ends the connection, and with it the work."""

    def __init__(self, client: Client, model: str, request: CompletionRequest, keep_alive: float | None) -> None:
        self.request = request
        self._client = client
        self._body = {"model": model, **_as_json(request), **_kept(keep_alive)}
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is not None:
            self._response.close()

    async def start(self) -> None:
        """Wait for the head of the answer.

        Raises:
            MlxsupError: the error that the daemon answered with.
        """
        if self._response is None:
            self._response = await self._client.open("POST", "/completion", self._body)

    async def __aiter__(self) -> AsyncIterator[CompletionChunk]:
        await self.start()
        assert self._response is not None
        async with contextlib.aclosing(_lines(self._client, self._response)) as lines:
            async for line in lines:
                chunk = self._read(line)
                yield chunk
                if chunk.done:
                    return
        raise BadAnswer(f"the answer of {self._client.url} ended before its last line")

    def _read(self, line: bytes) -> CompletionChunk:
        try:
            return msgspec.json.decode(line, type=_Line).checked(self._client)
        except msgspec.DecodeError as error:
            raise BadAnswer(f"a line from {self._client.url} is no chunk: {error}") from error


class _Line(CompletionChunk, frozen=True, kw_only=True):
    """A line of an answer: a chunk, or the error that ends it."""

    error: dict[str, Any] | None = None

    def checked(self, client: Client) -> CompletionChunk:
        if self.error is not None:
            raise client.error_from(self.error)
        return self


async def _lines(client: Client, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """Split the body into lines of any length, in time linear in their length."""
    pieces: list[bytes] = []
    with client._explained():  # noqa: SLF001 - the other half of the same client
        async for part in response.content.iter_any():
            *ended, rest = part.split(b"\n")
            for piece in ended:
                yield b"".join((*pieces, piece))
                pieces.clear()
            if rest:
                pieces.append(rest)


def _as_json(request: CompletionRequest) -> dict[str, Any]:
    found = msgspec.to_builtins(request)
    assert isinstance(found, dict)
    return found


def _kept(keep_alive: float | None) -> dict[str, float]:
    return {} if keep_alive is None else {"keep_alive": keep_alive}


def _base(url: str) -> str:
    whole = url if "://" in url else f"http://{url}"
    if not whole.startswith(("http://", "https://")) or not whole.partition("://")[2]:
        raise InvalidRequest(f"{url!r} is no address of a daemon; write http://host:port or unix:/path")
    return whole.rstrip("/")


def _kinds() -> dict[str, type[MlxsupError]]:
    """Return every error class by its code; of two with one code the more general."""
    found: dict[str, type[MlxsupError]] = {}
    level = [MlxsupError]
    while level:
        for kind in level:
            found.setdefault(kind.code, kind)
        level = [child for kind in level for child in kind.__subclasses__()]
    return found
