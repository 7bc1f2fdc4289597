"""An answer passed on as it is: the runner's own bytes, checked as they pass but never held whole.

Short lines are read before they are passed on, so that a bad one is not. A long one, such as a picture in base64, is passed
on piece by piece while its skeleton (the line without the insides of its strings) is kept, and read at its end.
"""

from __future__ import annotations

from typing import NoReturn

from mlxsup.errors import BadAnswer, MlxsupError
from mlxsup.runners.reading import Take
from mlxsup.runners.relay import Answer, AnswerBroke, is_last_chunk

LONG_LINE = 16 * 1024
SHORT_LINES = 1024
"""Bytes a line, on average, up to which lines are read many at a time."""
MAX_SKELETON = 1 << 20
MAX_TAIL = 64
"""Bytes of white space behind a long line up to which its end is found before it has passed."""
KEPT_OF_STRINGS = 64
"""Bytes kept of each string: enough for every key, and to tell a picture from none and an error from a text."""


class Skeleton:
    """One JSON line without the insides of its long strings; still JSON if the line is."""

    def __init__(self) -> None:
        self.json = bytearray()
        self._in_string = False
        self._escaped = False
        self._room = 0

    def feed(self, data: bytes) -> None:
        """Take more of the line.

        Raises:
            BadAnswer: too much of it is outside of strings.
        """
        at = 0
        quote = -1
        while at < len(data):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            if quote < at:
                found = data.find(b'"', at)
                quote = found if found >= 0 else len(data)
            if self._in_string:
                at = self._string(data, at, quote)
            else:
                self.json += data[at : quote + 1]
                self._in_string = quote < len(data)
                self._room = KEPT_OF_STRINGS
                at = quote + 1
        if len(self.json) > MAX_SKELETON:
            raise BadAnswer(f"the runner sent a line with more than {MAX_SKELETON} bytes outside of strings")

    def _string(self, data: bytes, at: int, quote: int) -> int:
        """Keep little of a string that goes on at `at`, up to its next escape or, at `quote`, its end; return what follows."""
        escape = data.find(b"\\", at, quote)
        end = quote if escape < 0 else escape
        kept = data[at : min(end, at + self._room)].decode("utf-8", "ignore").encode()
        if not kept and self._room == KEPT_OF_STRINGS and (end > at or escape >= 0):
            kept = b"?"  # it begins with an escape, or with half a character: still a string that says something
        self.json += kept
        if escape >= 0:
            self._escaped = True
            self._room = 0
        elif end == len(data):
            self._room = 0 if end - at > self._room else self._room - len(kept)
        else:
            self.json += b'"'
            self._in_string = False
        return end + 1


class Passage:
    """The bytes of one answer: as many whole lines as have come or, of long ones, pieces; ends well only after a `done` chunk."""

    def __init__(self, answer: Answer, seed: int | None) -> None:
        self._answer = answer
        self._seed = seed
        self._held = b""
        self._long: Skeleton | None = None
        self._failure: MlxsupError | AnswerBroke | None = None
        self.ended = False

    async def pass_on(self, take: Take) -> bool:
        """Hand to `take` what can be passed on, as soon as it is there, until it wants no more for now.

        Returns False after the line with `done`. What passed before a failure counts; a failure in the middle of a long line
        leaves that line unfinished.

        Raises:
            RunnerDied, BadAnswer, RunnerError, Stalled: as Answer.next_chunk.
        """
        enough = False

        def took(block: bytes) -> bool:
            nonlocal enough
            if passed := self._judge(block):
                enough = not take(passed)
            return not (enough or self.ended or self._failure)

        while not (enough or self.ended or self._failure):
            why = "its answer ended without a last chunk"
            try:
                more = await self._answer.read(took)
            except AnswerBroke as broke:
                more, why = False, str(broke)
            if not more:
                took(await self._last_newline(why))
        if self._failure is not None and not enough:
            await self._fail(self._failure)
        return not self.ended

    def _judge(self, block: bytes) -> bytes:
        """Look at the lines that `block` completes; return what can be passed on, the block itself where that is all of it."""
        data = self._held + block if self._held else block
        self._held = b""
        start = self._pass_many(data)
        if start == len(data):
            return data
        changed: list[bytes] = []
        as_it_is = 0
        try:
            while not self.ended and (end := data.find(b"\n", start)) >= 0:
                instead = self._finish_line(data[start:end])
                if instead is not None:
                    changed += (data[as_it_is:start], instead)
                    as_it_is = end + 1
                start = end + 1
            if not self.ended:
                start = self._begin_line(data, start)
        except (MlxsupError, AnswerBroke) as failure:
            self._answer.close()
            self._failure = self._answer.testify(failure) if isinstance(failure, MlxsupError) else failure
        passed = data[as_it_is:start]
        return b"".join((*changed, passed)) if changed else passed

    def _pass_many(self, data: bytes) -> int:
        """Judge short whole lines all at once; return where they end, 0 where anything about them is out of the ordinary."""
        end = data.rfind(b"\n") + 1
        if self._long is not None or end > SHORT_LINES * data.count(b"\n"):
            return 0
        return end if self._answer.accept_all(data[:end]) else 0

    def _finish_line(self, line: bytes) -> bytes | None:
        """Judge a line, or the last piece of a long one; return what is to be passed on instead, None for the line itself."""
        if self._long is None and len(line) <= LONG_LINE:
            if not line or line.isspace():
                return b""
            chunk = self._answer.decode(line)
        else:
            skeleton, self._long = self._long or Skeleton(), None
            skeleton.feed(line)
            chunk = self._answer.decode(skeleton.json)
        self._answer.accept(chunk)
        if not chunk.done:
            return None
        self.ended = True
        return self._with_seed(line) if chunk.seed is None else None

    def _begin_line(self, data: bytes, start: int) -> int:
        """Keep the line that begins, or goes on, at `start`; return up to where it can be passed on already."""
        rest = data[start:]
        if self._long is None and len(rest) <= LONG_LINE:
            self._held = rest
            return start
        self._long = self._long or Skeleton()
        end = _end_of_object(rest)
        self._held = rest[end:]
        self._long.feed(rest[:end])
        return start + end

    async def _last_newline(self, why: str) -> bytes:
        """The answer is over: its last line may lack no more than its newline."""
        rest = (self._held if self._long is None else bytes(self._long.json) + self._held).strip()
        if not is_last_chunk(rest):
            await self._answer.fail(f"{why}, in the middle of a line" if rest else why)
        return b"\n"

    async def _fail(self, failure: MlxsupError | AnswerBroke) -> NoReturn:
        if isinstance(failure, AnswerBroke):
            await self._answer.fail(str(failure))
        raise failure

    def _with_seed(self, line: bytes) -> bytes | None:
        """Report the seed that was chosen here."""
        line = line.rstrip()
        if self._seed is None or not line.endswith(b"}"):
            return None
        return line.removesuffix(b"}") + b',"seed":%d}\n' % self._seed


def _end_of_object(data: bytes) -> int:
    """Return where the brace is that may end an object, if no more than white space follows; else where the data ends."""
    tail = data[-MAX_TAIL:].rstrip()
    return len(data) - len(data[-MAX_TAIL:]) + len(tail) - 1 if tail.endswith(b"}") else len(data)
