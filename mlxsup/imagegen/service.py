"""The HTTP side of the runner: health, completions as NDJSON, and when to end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket as sockets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
from aiohttp import web

from mlxsup.errors import BodyTooLarge, Loading, MlxsupError, ShuttingDown
from mlxsup.imagegen.lines import Line, Lines
from mlxsup.imagegen.orders import read_order, settings_of
from mlxsup.imagegen.pipelines.base import Loader
from mlxsup.imagegen.worker import Job, Worker
from mlxsup.protocol import CompletionChunk
from mlxsup.threads import in_thread

HEARTBEAT = 10.0
"""Seconds without a line after which the last step line is sent again."""

LARGEST_BODY = 128 << 20
"""Bytes of a request; pictures travel in it."""

SUPERVISOR_CHECK = 1.0
"""Seconds between two looks at who the parent is."""

GRACE = 0.3
"""Seconds that the step in work, and then the open answers, get to end when the runner is told to."""

_encoder = msgspec.json.Encoder()
logger = logging.getLogger(__name__)


class Service:
    """One model on one listening socket.

    Args:
        load: makes the pipeline; from `pipelines.base.resolve`.
        model: its name or path, for health; pictures tell the name alone.
        max_pixels: see `orders.read_order`.
        listener: bound and listening; closed at the end.
        ready_fd: gets one byte, and is closed, as soon as the model is loaded.
        supervisor: process id that must stay this process's parent; None if nobody supervises it.
        heartbeat: see `HEARTBEAT`.
    """

    def __init__(
        self,
        load: Loader,
        *,
        model: str,
        max_pixels: int | None = None,
        listener: sockets.socket,
        ready_fd: int | None = None,
        supervisor: int | None = None,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self.worker = Worker(load, on_ready=self._tell_ready, on_failed=self._failed)
        self._model = model
        self._max_pixels = max_pixels
        self._listener = listener
        self._ready_fd = ready_fd
        self._supervisor = supervisor
        self._heartbeat = heartbeat
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()
        self._failure: str | None = None
        self._answers: set[Lines] = set()
        self._reading = ThreadPoolExecutor(1, "reading")

    async def serve(self) -> str | None:
        """Load the model and serve it until `end` is called; once only.

        Returns:
            Why the model could not be loaded, or no picture can be made any more, in one line; None after an orderly end.
        """
        self._loop = asyncio.get_running_loop()
        app = web.Application(middlewares=[_errors_as_json])
        app.router.add_get("/health", self._health)
        app.router.add_post("/completion", self._completion)
        # Without handler_cancellation a caller who leaves before the next line would not be noticed.
        site = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=GRACE)
        await site.setup()
        await web.SockSite(site, self._listener).start()
        self.worker.start()
        watch = asyncio.create_task(self._watch_supervisor())
        try:
            await self._ending.wait()
        finally:
            watch.cancel()
            why = self._failure or "the runner is ending"
            for lines in self._answers:
                lines.put(Line.of(CompletionChunk(content=f"error: {why}", done=True)))
            self._reading.shutdown(wait=False)
            await in_thread(self.worker.stop, GRACE)
            await site.cleanup()
        return self._failure

    def end(self) -> None:
        """Make `serve` give up all work and return; for the loop's thread."""
        self._ending.set()

    async def _health(self, _: web.Request) -> web.Response:
        if self.worker.pipeline is None:
            return _json({"status": "loading", "progress": self.worker.progress}, 503)
        state = {
            "status": "ok",
            "pid": os.getpid(),
            "model": self._model,
            "busy": self.worker.busy,
            "memory": self.worker.memory,
        }
        return _json(state, 200)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        pipeline = self.worker.pipeline
        if pipeline is None:
            raise Loading("the model is still being loaded")
        body = await _read(request)
        self._check_ending()
        # One at a time: pictures that come along are decoded, and each may take much memory.
        order, output = await asyncio.get_running_loop().run_in_executor(
            self._reading, read_order, body, pipeline, self._max_pixels
        )
        self._check_ending()
        del body
        lines = Lines()
        lines.put(Line.of(CompletionChunk(step=0, total=order.steps)))
        settings = settings_of(order, pipeline, _name(self._model)) if output.metadata else None
        job = Job(order, output, settings, lambda chunk: self._deliver(lines, chunk))
        self.worker.submit(job)
        self._answers.add(lines)
        try:
            return await self._answer(request, lines)
        finally:
            self._answers.discard(lines)
            self.worker.give_up(job)

    def _check_ending(self) -> None:
        if self._ending.is_set():
            raise ShuttingDown("the runner is ending")

    async def _answer(self, request: web.Request, lines: Lines) -> web.StreamResponse:
        """Send lines up to the last; the latest step again whenever `heartbeat` seconds bring none."""
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        line = step = await lines.get()
        while True:
            await response.write(line.data)
            if line.last:
                break
            line = step
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    line = await lines.get()
            step = step if line.preview else line
        await response.write_eof()
        return response

    def _deliver(self, lines: Lines, chunk: CompletionChunk) -> None:
        """Called in the worker's thread, which also encodes: a large picture would hold the loop up."""
        assert self._loop is not None
        line = Line.of(chunk)
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(lines.put, line)

    def _tell_ready(self) -> None:
        """Called in the worker's thread, so that the word goes out at once."""
        if self._ready_fd is not None:
            with suppress(OSError), os.fdopen(self._ready_fd, "wb", buffering=0) as pipe:
                pipe.write(b"\n")

    def _failed(self, why: str) -> None:
        """Called in the worker's thread."""
        assert self._loop is not None
        self._failure = why
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.end)

    async def _watch_supervisor(self) -> None:
        while self._supervisor is not None:
            if os.getppid() != self._supervisor:
                logger.info("the supervisor is gone, ending")
                self.end()
                return
            await asyncio.sleep(SUPERVISOR_CHECK)


def _name(model: str) -> str:
    """Return what a model is called without where it is kept; a folder of the Hugging Face cache is named after its repository."""
    path = Path(model)
    name = path.parents[1].name if path.parent.name == "snapshots" else path.name
    return (name.rpartition("--")[2] if name.startswith("models--") else name) or model


async def _read(request: web.Request) -> bytearray:
    """Read a body; unlike `request.read`, the request does not keep it for as long as the answer takes."""
    body = bytearray()
    async for block in request.content.iter_any():
        body += block
        if len(body) > LARGEST_BODY:
            raise BodyTooLarge(f"the body is larger than {LARGEST_BODY >> 20} MiB")
    return body


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except MlxsupError as error:
        return _error(error.status, error.code, error.message)
    except web.HTTPException as error:
        return _error(
            error.status, error.reason.lower().replace(" ", "_"), f"{request.method} {request.path}: {error.reason}"
        )


def _error(status: int, code: str, message: str) -> web.Response:
    return _json({"error": {"message": message, "code": code}}, status)


def _json(body: Mapping[str, object], status: int) -> web.Response:
    return web.Response(body=_encoder.encode(body), status=status, content_type="application/json")
