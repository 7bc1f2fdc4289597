"""An answer passed on as it is: the runner's own bytes, checked as they pass but never held whole.

Short lines are read before they are passed on, so that a bad one is not. A long one, such as a picture in base64, is passed
on piece by piece while its skeleton (the line without the insides of its strings) is kept, and read at its end.
"""

from __future__ import annotations

import re
from collections import deque

from mlxsup.errors import BadAnswer, MlxsupError
from mlxsup.protocol import CompletionChunk
from mlxsup.runners.relay import Answer, AnswerBroke, is_last_chunk

LONG_LINE = 64 * 1024
MAX_SKELETON = 1 << 20
KEPT_OF_STRINGS = 64
"""Bytes kept of each string: enough for every key, and to tell a picture from none and an error from a text."""

_STRING_END = re.compile(rb'["\\]')


class Skeleton:
    """One JSON line without the insides of its long strings; still JSON if the line is."""

    def __init__(self) -> None:
        self.json = bytearray()
        self._in_string = False
        self._escaped = False
        self._room = 0

    def feed(self, data: bytes | bytearray) -> None:
        """Take more of the line.

        Raises:
            BadAnswer: too much of it is outside of strings.
        """
        at = 0
        while at < len(data):
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                at = self._string(data, at)
            else:
                end = data.find(b'"', at) + 1
                self._in_string = end > 0
                self._room = KEPT_OF_STRINGS
                self.json += data[at : end or len(data)]
                at = end or len(data)
        if len(self.json) > MAX_SKELETON:
            raise BadAnswer(f"the runner sent a line with more than {MAX_SKELETON} bytes outside of strings")

    def _string(self, data: bytes | bytearray, at: int) -> int:
        found = _STRING_END.search(data, at)
        end = found.start() if found else len(data)
        kept = bytes(data[at : min(end, at + self._room)]).decode("utf-8", "ignore").encode()
        if not kept and self._room == KEPT_OF_STRINGS and (end > at or (found and found[0] == b"\\")):
            kept = b"?"  # it begins with an escape, or with half a character: still a string that says something
        self.json += kept
        if found is None:
            self._room = 0 if end - at > self._room else self._room - len(kept)
            return end
        if found[0] == b"\\":
            self._escaped = True
            self._room = 0
        else:
            self.json += b'"'
            self._in_string = False
        return end + 1


class Passage:
    """The bytes of one answer, line by line or, of long lines, piece by piece; ends well only after a `done` chunk."""

    def __init__(self, answer: Answer, seed: int | None) -> None:
        self._answer = answer
        self._seed = seed
        self._held = bytearray()
        self._long: Skeleton | None = None
        self._ready: deque[bytes] = deque()
        self._failure: MlxsupError | None = None
        self.ended = False

    async def next_bytes(self) -> bytes:
        """Return the next bytes to pass on, b"" after the line with `done`.

        What passed before a failure counts; a failure in the middle of a long line leaves that line unfinished.

        Raises:
            RunnerDied, BadAnswer, RunnerError, Stalled: as Answer.next_chunk.
        """
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            if self.ended:
                return b""
            await self._take_block()
        return self._ready.popleft()

    async def _take_block(self) -> None:
        try:
            why, block = "its answer ended without a last chunk", await self._answer.read_block()
        except AnswerBroke as broke:
            why, block = str(broke), b""
        if not block:
            await self._end(why)
            return
        passed: list[bytes] = []
        try:
            *whole, rest = block.split(b"\n")
            for piece in whole:
                await self._line_end(piece, passed)
                if self.ended:
                    return
            self._line_part(rest, passed)
        except MlxsupError as failure:
            self._answer.close()
            self._failure = self._answer.testify(failure)
        finally:
            if passed:
                self._ready.append(b"".join(passed))

    def _line_part(self, piece: bytes, passed: list[bytes]) -> None:
        if self._long is not None:
            self._long.feed(piece)
            passed.append(piece)
            return
        self._held += piece
        if len(self._held) > LONG_LINE:
            self._long = Skeleton()
            self._long.feed(self._held)
            passed.append(bytes(self._held))
            self._held.clear()

    async def _line_end(self, piece: bytes, passed: list[bytes]) -> None:
        self._line_part(piece, passed)
        if self._long is not None:
            chunk = self._answer.decode(self._long.json)
            self._long = None
            passed.append(b"\n")
            await self._accept(chunk)
            return
        line = bytes(self._held).strip()
        self._held.clear()
        if line:
            chunk = self._answer.decode(line)
            await self._accept(chunk)
            passed.append(self._with_seed(line, chunk) + b"\n")

    async def _end(self, why: str) -> None:
        """The answer is over: its last line may lack no more than its newline."""
        rest = bytes(self._held if self._long is None else self._long.json).strip()
        if not is_last_chunk(rest):
            await self._answer.fail(f"{why}, in the middle of a line" if rest else why)
        passed: list[bytes] = []
        await self._line_end(b"", passed)
        self._ready.append(b"".join(passed))

    async def _accept(self, chunk: CompletionChunk) -> None:
        await self._answer.accept(chunk)
        self.ended = chunk.done

    def _with_seed(self, line: bytes, chunk: CompletionChunk) -> bytes:
        """Report the seed that was chosen here, if the runner does not."""
        if not chunk.done or chunk.seed is not None or self._seed is None:
            return line
        return line.removesuffix(b"}") + b',"seed":%d}' % self._seed
