"""An answer of a runner: bytes to lines, lines to chunks, and every way of ending badly told apart from the good one."""

from __future__ import annotations

import asyncio
import io
import time
from collections import deque
from contextlib import suppress
from typing import NoReturn, Protocol

import aiohttp
import msgspec
from aiohttp import hdrs

from mlxsup.errors import BadAnswer, MlxsupError, ResourceExhausted, RunnerError, Stalled
from mlxsup.protocol import CompletionChunk, CompletionRequest
from mlxsup.runners.alarm import Alarm
from mlxsup.runners.liveness import Pulse
from mlxsup.runners.reading import Reader, Take
from mlxsup.runners.refusals import MAX_MESSAGE, UNREADABLE, runner_refusal, stream_error
from mlxsup.shortages import is_shortage

MAX_LINE = 256 * 1024 * 1024
MAX_ERROR_BODY = 64 * 1024
LARGE_BODY = 256 * 1024
"""Bytes of a request beyond which it is written in pieces, between which others have their turn."""

_JSON = {"Content-Type": "application/json"}
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(CompletionChunk)
_ERROR_PREFIX = "error:"


class Witness(Protocol):
    """Who knows the runner behind an answer."""

    pulse: Pulse

    async def blame(self, what: str) -> MlxsupError:
        """Return why an answer broke off: the runner's death with its last words if it died, else `what`."""

    def testify(self, error: MlxsupError) -> MlxsupError:
        """Add the runner's last words to an error that it caused."""


class AnswerBroke(Exception):
    """An answer is broken, why its text says; what came before may still be whole."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long an answer may take, in seconds: until its first chunk, and between chunks."""

    first_chunk: float
    silence: float


class LineFramer:
    """Cuts a byte stream into lines without their newline; never merges two, never loses a byte."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._parts: list[bytes] = []
        self._held = 0
        self._max_line = max_line

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes.

        Raises:
            BadAnswer: a line longer than the limit.
        """
        *whole, rest = data.split(b"\n")
        lines = []
        for piece in whole:
            self._hold(piece)
            lines.append(b"".join(self._parts))
            self._parts.clear()
            self._held = 0
        self._hold(rest)
        return lines

    def _hold(self, piece: bytes) -> None:
        self._held += len(piece)
        if self._held > self._max_line:
            raise BadAnswer(f"the runner sent a line longer than {self._max_line} bytes")
        if piece:
            self._parts.append(piece)

    @property
    def rest(self) -> bytes:
        """What came after the last newline."""
        return b"".join(self._parts)


class _SilentError(Exception):
    """Ends a wait for bytes that has lasted too long."""


class Answer:
    """One streamed answer, read by the caller's own task; `close` aborts the work in the runner.

    Image work, which an answer with steps is too, must end with a picture and may report an error in its last line; a
    preview is no such picture. `started` tells whether its first chunk has come.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        limits: Limits,
        witness: Witness,
        *,
        waited: float = 0.0,
        pictures: bool = False,
    ) -> None:
        self._response = response
        self._reader = Reader(response)
        self._limits = limits
        self._limit = limits.first_chunk
        self._alarm = Alarm(self._end_silence)
        self._witness = witness
        self._open = True
        self._first_awaited = True
        witness.pulse.answering += 1
        self._framer = LineFramer()
        self._lines: deque[bytes] = deque()
        self.started = False
        self._waits_since = 0.0
        self._waited = waited
        self._image_work = pictures
        self._image_seen = False

    async def next_chunk(self) -> CompletionChunk:
        """Return the next chunk; not to be called again after the one with `done`.

        Raises:
            RunnerDied: the process ended before `done`.
            BadAnswer: cut off, malformed, or `done` without the picture it promised.
            RunnerError: the runner reported an error in its stream.
            MlxsupError: the class that belongs to the code of that error, where it is one of ours.
            Stalled: nothing came for the silence limit.
        """
        line = await self._next_line()
        chunk = self.decode(line)
        try:
            self.accept(chunk)
        except AnswerBroke as broke:
            await self.fail(str(broke))
        return chunk

    def decode(self, line: bytes | bytearray) -> CompletionChunk:
        """Read one line.

        Raises:
            BadAnswer: it is no chunk.
            MlxsupError: the error that it reports: a RunnerError, or the class that belongs to its code.
        """
        bad: MlxsupError | None
        try:
            chunk = _decoder.decode(line)
        except UNREADABLE as error:
            self.close()
            shown = bytes(line[:80]).decode("utf-8", errors="replace")
            bad = stream_error(line) or BadAnswer(f"the runner sent a line that is no chunk ({error}): {shown}")
        else:
            bad = None if chunk.image else stream_error(line)
            if bad is None:
                return chunk
        self._drop()
        raise self.testify(bad)

    def accept(self, chunk: CompletionChunk) -> None:
        """Take note of the next chunk; its connection is dropped after the one with `done`.

        Raises:
            RunnerError: the chunk reports an error.
            AnswerBroke: it says done without the picture it promised.
        """
        self._note_picture(chunk)
        if chunk.done:
            self._accept_last(chunk)
        else:
            self._note_start()

    def accept_all(self, lines: bytes) -> bool:
        """Take note of whole lines at once; False when each has to be seen: one is no chunk, blank, an error or the last."""
        if b'"error"' in lines:
            return False
        try:
            chunks = _decoder.decode_lines(lines)
        except UNREADABLE:
            return False
        if len(chunks) != lines.count(b"\n"):
            return False
        for chunk in chunks:
            if chunk.done:
                return False
            if chunk.total is not None or chunk.image or chunk.preview:
                self._note_picture(chunk)
        if chunks and not self.started:
            self._note_start()
        return True

    async def read(self, take: Take) -> bool:
        """Hand bytes to `take` as they come until it wants no more for now; returns False at the end of the answer.

        Raises:
            AnswerBroke: the connection broke.
            Stalled: nothing came for as long as an answer may be silent.
            Exception: what `take` raises.
        """

        def took(block: bytes) -> bool:
            now = time.monotonic()
            pulse.heard_at = now
            self._waited = self._waited + now - self._waits_since if block.isspace() else 0.0
            if not take(block):
                return False
            self._wait_from(now)
            return True

        pulse = self._witness.pulse
        pulse.asked_at = time.monotonic()
        pulse.listening += 1
        self._wait_from(pulse.asked_at)
        try:
            return await self._reader.read(took)
        except _SilentError:
            self._drop()
            what, stage = ("nothing more", "silence") if self.started else ("no first chunk", "first_chunk")
            details = {"stage": stage, "limit": float(self._limit)}
            stalled = Stalled(f"the runner sent {what} for {self._limit:g} s", details=details)
            raise self.testify(stalled) from None
        except (aiohttp.ClientError, OSError) as error:
            raise AnswerBroke(f"its answer broke off: {error}") from error
        finally:
            pulse.listening -= 1
            self._alarm.hush()

    def testify(self, error: MlxsupError) -> MlxsupError:
        """Add the runner's last words to an error; adding them twice changes nothing."""
        return self._witness.testify(error)

    async def fail(self, what: str) -> NoReturn:
        """Drop the connection and raise why the answer is none: the runner's death if it died, else `what`."""
        self._drop()
        raise await self._witness.blame(what)

    def close(self) -> None:
        """Drop the connection; a runner at work sees its caller leave. Safe to call twice."""
        if self._open:
            self._witness.pulse.leave(self._limit)
        self._drop()

    def _drop(self) -> None:
        """Drop the connection of an answer that is at its end, or has had its time."""
        self._note_first()
        if self._open:
            self._open = False
            self._witness.pulse.answering -= 1
        self._alarm.cancel()
        self._response.close()

    def _wait_from(self, now: float) -> None:
        self._waits_since = now
        self._alarm.set(now + self._limit - self._waited)

    def _end_silence(self) -> None:
        self._reader.break_off(_SilentError())

    async def _next_line(self) -> bytes:
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line.strip():
                    return line
            try:
                if not await self.read(self._frame):
                    return await self._last_line("its answer ended without a last chunk")
            except AnswerBroke as broke:
                return await self._last_line(str(broke))
            except BadAnswer as bad:
                self.close()
                raise self.testify(bad) from None

    def _frame(self, block: bytes) -> bool:
        self._lines.extend(self._framer.feed(block))
        return not self._lines

    async def _last_line(self, why: str) -> bytes:
        rest = self._framer.rest.strip()
        if is_last_chunk(rest):
            return rest
        return await self.fail(f"{why}, in the middle of a line" if rest else why)

    def _accept_last(self, chunk: CompletionChunk) -> None:
        if chunk.content.startswith(_ERROR_PREFIX) and self._may_fail_in_band(chunk):
            self._drop()
            told = chunk.content.removeprefix(_ERROR_PREFIX).strip()[:MAX_MESSAGE]
            raise self.testify(RunnerError(told, status=500))
        if self._image_work and not self._image_seen:
            raise AnswerBroke("it said done without a picture")
        self._note_start()
        self._drop()

    def _note_start(self) -> None:
        self.started = True
        self._limit = self._limits.silence
        self._note_first()

    def _note_picture(self, chunk: CompletionChunk) -> None:
        self._image_work = self._image_work or chunk.preview or chunk.total is not None
        self._image_seen = self._image_seen or (bool(chunk.image) and not chunk.preview)

    def _note_first(self) -> None:
        if self._first_awaited:
            self._first_awaited = False
            self._witness.pulse.waiting -= 1

    def _may_fail_in_band(self, chunk: CompletionChunk) -> bool:
        """An image runner's last words, or a text that happens to begin with `error:`?"""
        return self._image_work or (not self.started and chunk.eval_count is None)


def is_last_chunk(rest: bytes | bytearray) -> bool:
    """Tell whether what came after the last newline is a whole chunk that ends the answer, well or not, but for its newline."""
    with suppress(*UNREADABLE):
        return bool(rest) and (stream_error(rest) is not None or _decoder.decode(rest).done)
    return False


async def post_completion(
    session: aiohttp.ClientSession,
    url: str,
    request: CompletionRequest,
    limits: Limits,
    witness: Witness,
    *,
    pictures: bool = False,
) -> Answer:
    """Send a request and return its answer once the runner has accepted it.

    Raises:
        RunnerError: the runner refused; its message, trimmed, and its status.
        MlxsupError: the class that belongs to the runner's own error code, where it is one of ours.
        RunnerDied, BadAnswer, Stalled: as for Answer.
        ResourceExhausted: we have no descriptor to ask it with.
    """
    pulse = witness.pulse
    pulse.waiting += 1
    pulse.listening += 1
    began = time.monotonic()
    try:
        response = await _post(session, url, _encoder.encode(request), limits, witness)
    except BaseException as error:
        pulse.waiting -= 1
        if isinstance(error, asyncio.CancelledError):
            pulse.leave(limits.first_chunk)
        raise
    finally:
        pulse.listening -= 1
    return Answer(response, limits, witness, waited=time.monotonic() - began, pictures=pictures)


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, limits: Limits, witness: Witness
) -> aiohttp.ClientResponse:
    try:
        async with asyncio.timeout(limits.first_chunk):
            data = body if len(body) <= LARGE_BODY else io.BytesIO(body)
            response = await session.post(url, data=data, headers=_JSON, allow_redirects=False)
            if response.status == 200:
                return response
            text = await _read_at_most(response, MAX_ERROR_BODY)
    except aiohttp.ServerTimeoutError as error:  # a TimeoutError too, but of the connect
        raise await witness.blame(f"it took no connection: {error}") from error
    except TimeoutError:
        late = f"the runner did not answer within {limits.first_chunk:g} s"
        details = {"stage": "first_chunk", "limit": float(limits.first_chunk)}
        raise witness.testify(Stalled(late, details=details)) from None
    except (aiohttp.ClientError, OSError) as error:
        if is_shortage(error):
            raise ResourceExhausted.of("cannot ask the runner", error) from error
        raise await witness.blame(f"it did not take the request: {error}") from error
    raise witness.testify(runner_refusal(response.status, text, response.headers.get(hdrs.RETRY_AFTER)))


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    found = bytearray()
    try:
        while len(found) < limit and (data := await response.content.readany()):
            found += data
    finally:
        response.close()
    return bytes(found[:limit])
