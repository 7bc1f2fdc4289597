"""A child's output: chunks to lines, lines to a ring of last words, and the one line that says what went wrong.

Memory is bounded however the child behaves: a line keeps its head and its tail, a stream its first and its last lines.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, get_args

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")
Cause = Literal[
    "out_of_memory",
    "missing_library",
    "missing_file",
    "port_in_use",
    "gpu_timeout",
    "panic",
    "traceback",
    "error",
    "unknown",
]
"""What a runner's last words speak of, gravest and most telling first; `unknown` when no line looks like an error."""

LINE_HEAD = 6 * 1024
LINE_TAIL = 2 * 1024
FIRST_LINES = 20
LAST_LINES = 100
SHOWN_HEAD = 350
SHOWN_TAIL = 150
"""Characters of a long line that an error's message has; its details have the whole."""
LINES_PER_CHUNK = 400
"""More than twice what is kept, so that leaving out the middle of a chunk changes nothing of it."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f]")

_CLASSES: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (
        "out_of_memory",
        re.compile(
            r"""out\ of\ memory | cannot\ allocate\ memory | memoryerror\b | std::bad_alloc | failed\ to\ allocate
            | outofmemory | insufficient\ memory | unable\ to\ allocate | maximum\ allowed\ buffer\ size""",
            re.VERBOSE,
        ),
    ),
    (
        "missing_library",
        re.compile(
            r"""modulenotfounderror\b | importerror\b | error\ while\ loading\ shared\ libraries | library\ not\ loaded
            | image\ not\ found | cannot\ open\ shared\ object\ file | is\ not\ importable""",
            re.VERBOSE,
        ),
    ),
    (
        "port_in_use",
        re.compile(
            r"address already in use|eaddrinuse|port \d{1,5} is (?:already )?in use|(?:couldn't|cannot|failed to) bind\b"
        ),
    ),
    (
        "gpu_timeout",
        re.compile(r"gpu timeout|kiogpucommandbuffercallbackerror|command buffer execution failed|xid \(|gpu hang"),
    ),
    (
        "missing_file",
        re.compile(r"filenotfounderror\b|no such file or directory|failed to open\b(?:(?!failed to open).)*?\bfile"),
    ),
    (
        "panic",
        re.compile(
            r"""panicked\ at\b | ^panic: | ^fatal\ error: | segmentation\ fault | ggml_assert
            | assertion\ (?:(?!assertion\ ).)*?failed | terminate\ called | libc\+\+abi:\ terminating | ^\s*what\(\):""",
            re.VERBOSE,
        ),
    ),
)
"""Looked for in folded lines, each in a time that grows as the line does: a prompt that a runner logs comes here too."""
_TELLING = (
    *(b"error", b"fatal", b"critical", b"traceback", b"memory", b"bad_alloc", b"allocate", b"buffer size"),
    *(b"librar", b"image not found", b"shared object", b"importable", b"in use", b" bind", b"no such file", b"failed"),
    *(b"timeout", b"hang", b"xid (", b"panic", b"segmentation", b"assert", b"terminat", b"what():"),
)
"""Words, folded, one of which is in every line that some class above matches: looked for at the speed of memory."""
_TELLING_WORDS = tuple(word.decode() for word in _TELLING)
_TRACEBACK = "Traceback (most recent call last):"
_GUTTER = re.compile(r"^ *[|+] (?:Exception Group )?")
"""What the traceback of an exception group has in front of its lines."""
_RAISED = re.compile(r"^[A-Za-z_][\w.<>]*(?::|$)")
_LEVEL = re.compile(
    r"(?:INFO|DEBUG|TRACE|NOTICE|WARN(?:ING)?|ERROR|CRITICAL|FATAL|info|debug|trace|notice|warn(?:ing)?|error|critical|fatal):"
)
"""How a log line of another thread may begin, that comes between the lines of a traceback: no exception has such a name."""
_ERROR = re.compile(r"^(?:\S+ +){0,4}(?:\[?(?:error|fatal|critical)\b\]?:?)|\b(?:error|failed|fatal)\b:")
_RANK: dict[Cause, int] = {cause: -rank for rank, cause in enumerate(get_args(Cause))}
"""Higher wins: the classes are listed gravest first."""
_WARNS = re.compile(r"^(?:\S+ +){0,4}\[?warn(?:ing)?\b")
_HEDGE = re.compile(
    r"""warning: | retrying\b | will\ retry\b | retry\ (?:in|with|after)\b | trying\ again\b | fall(?:s|ing)?\ back\b
    | fallback\b | ignor(?:ed|ing)\b | skipp(?:ed|ing)\b | continuing\b""",
    re.VERBOSE,
)
"""A line that says itself that the program goes on: what it speaks of is the end only if nothing worse follows."""
_HEDGED = -len(_RANK)
_WORKED_ON = 20
"""After this many ordinary lines a program has got over its error: a later one that says what it is counts more."""
_AFTERMATH = 5.0
"""Seconds for which what follows an error may still be told because of it, as a dump of all stacks, however long it is."""
_LONG_AGO = 100
"""After this many ordinary lines beyond the aftermath an error explains nothing any more: any later one counts more."""
_STRANGERS = 20
"""A traceback of which nothing more came for this many lines is over, though the line with its exception was not seen."""
_SLIGHT: frozenset[Cause] = frozenset({"error", "unknown"})
"""Classes that say little: after a grave error they are more often its echo than news."""


def clean(raw: bytes) -> str:
    """Decode one line for people: bad UTF-8 replaced, control sequences gone, progress bars shown as they ended."""
    text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
    return _CONTROL.sub("", text.rpartition("\r")[2]).rstrip()


def shown(line: str) -> str:
    """Return a line as it goes into a message for people: of a long one the two ends."""
    if len(line) <= SHOWN_HEAD + SHOWN_TAIL:
        return line
    return f"{line[:SHOWN_HEAD].rstrip()} [...] {line[-SHOWN_TAIL:].lstrip()}"


class LineSplitter:
    """Cuts chunks into lines. Of a line longer than LINE_HEAD + LINE_TAIL bytes the middle is left out, and said so.

    Of a chunk with more than LINES_PER_CHUNK lines the middle ones go to `on_skipped` as they are, all at once: a flood of
    short lines must not hold the loop.
    """

    def __init__(self, on_line: Callable[[str], None], on_skipped: Callable[[list[bytes]], None]) -> None:
        self._on_line = on_line
        self._on_skipped = on_skipped
        self._head = bytearray()
        self._tail = b""
        self._skipped = 0
        self._returned = False

    def feed(self, chunk: bytes) -> None:
        """Take bytes as they came; calls `on_line` for each line that is now whole."""
        *whole, rest = chunk.split(b"\n")
        if len(whole) > LINES_PER_CHUNK:
            kept = LINES_PER_CHUNK // 2
            self._take(whole[:kept])
            self._on_skipped(whole[kept:-kept])
            self._take(whole[-kept:])
        else:
            self._take(whole)
        self._extend(rest)

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            self._extend(line)
            self.flush()

    def flush(self) -> None:
        """End the line in hand, as at the end of the stream."""
        line = self.pending()
        self._forget()
        if line:
            self._on_line(line)

    def pending(self) -> str:
        """Return the line in hand so far, "" when there is none."""
        if not self._tail:
            return clean(bytes(self._head))
        if not self._skipped:
            return clean(bytes(self._head) + self._tail)
        return f"{clean(bytes(self._head))} [... {self._skipped} bytes left out ...] {clean(self._tail)}"

    def _extend(self, piece: bytes) -> None:
        """Add to the line in hand; a carriage return before more text starts it anew, as on a terminal."""
        if not piece:
            return
        written = piece.rstrip(b"\r")
        start = written.rfind(b"\r") + 1
        if written and (start or self._returned):
            self._forget()
            piece = piece[start:]
        self._returned = piece.endswith(b"\r")
        self._append(piece)

    def _forget(self) -> None:
        self._head.clear()
        self._tail = b""
        self._skipped = 0
        self._returned = False

    def _append(self, piece: bytes) -> None:
        room = LINE_HEAD - len(self._head)
        if room > 0:
            self._head += piece[:room]
            piece = piece[room:]
        if piece:
            kept = (self._tail + piece)[-LINE_TAIL:] if len(piece) < LINE_TAIL else piece[-LINE_TAIL:]
            self._skipped += len(self._tail) + len(piece) - len(kept)
            self._tail = kept


class Diagnosis:
    """Follows stderr line by line and remembers the line that best says what went wrong.

    The gravest class wins, of one class the last line: what follows a grave error is mostly its echo, as in `out of memory`,
    `failed to load the model`, `exiting`. Two things turn that round: a line that says that the program goes on yields to any
    that does not, and so does an error after which the program worked on, when a later one tells something. One after which it
    worked on for long explains nothing any more.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cause: Cause = "unknown"
        self._line = ""
        self._rank = 2 * _HEDGED
        self._aftermath = 0.0
        self._ordinary = 0
        self._work = 0
        self._last = ""
        self._in_traceback = False
        self._strangers = 0

    @property
    def cause(self) -> Cause:
        """The class of the best line; `unknown` without one, and when it is too old to be why the program ends."""
        return "unknown" if self._is_old else self._cause

    @property
    def line(self) -> str:
        """The best line by class, with `earlier: ` before it if it is old; without one, the last line that was not empty."""
        return f"earlier: {self._line}" if self._is_old else self._line or self._last

    def read(self, line: str) -> bool:
        """Take one line and tell whether it looks like an error."""
        if line.strip():
            self._last = line.strip()
        folded = line.lower()
        cause = self._classify(line, folded)
        if cause == "unknown":
            if not self._in_traceback:
                self._count_ordinary(1)
            return self._in_traceback
        hedged = _WARNS.match(folded) or _HEDGE.search(folded)
        rank = _RANK[cause] + (_HEDGED if hedged else 0)
        news = self._ordinary >= _WORKED_ON and rank > _HEDGED and cause not in _SLIGHT
        if rank >= self._rank or news or self._is_old:
            self._cause = cause
            self._line = _GUTTER.sub("", line).strip()
            self._rank = rank
            self._aftermath = self._clock() + _AFTERMATH
            self._ordinary = self._work = 0
        return True

    def skip(self, count: int) -> None:
        """Count lines that were not looked at because nothing in them tells of an error."""
        self._count_ordinary(count)

    @property
    def _is_old(self) -> bool:
        return self._work >= _LONG_AGO

    def _count_ordinary(self, count: int) -> None:
        self._ordinary += count
        if self._line and self._clock() > self._aftermath:
            self._work += count

    def _classify(self, line: str, folded: str) -> Cause:
        if not self._in_traceback and not any(word in folded for word in _TELLING_WORDS):
            return "unknown"
        bare = _GUTTER.sub("", line)
        if bare.startswith(_TRACEBACK):
            self._in_traceback = True
            self._strangers = 0
            return "unknown"
        raised = False
        if self._in_traceback:
            if bare[:1].isspace():  # source text, which may speak of any error
                self._strangers = 0
                return "unknown"
            raised = bool(_RAISED.match(bare)) and not _LEVEL.match(bare)
            self._strangers += 1
            self._in_traceback = not raised and self._strangers < _STRANGERS
        for cause, pattern in _CLASSES:
            if pattern.search(folded):
                return cause
        if raised:
            return "traceback"
        return "error" if _ERROR.search(folded) else "unknown"


def telling_lines(lines: list[bytes]) -> list[str]:
    """Return, of a flood, the lines that may say what went wrong: the first and the last with each telling word."""
    block = b"\n".join(lines)
    folded = block.lower()
    found = {place for word in _TELLING for place in (folded.find(word), folded.rfind(word)) if place >= 0}
    starts = sorted({folded.rfind(b"\n", 0, place) + 1 for place in found})
    return [clean(block[start : start + LINE_HEAD].partition(b"\n")[0]) for start in starts]


class LastWords:
    """The first and the last lines of a stream, in order, with the gap between them named."""

    def __init__(self, first: int = FIRST_LINES, last: int = LAST_LINES) -> None:
        self._first: list[str] = []
        self._room = first
        self._last: deque[str] = deque(maxlen=last)
        self._count = 0

    def add(self, line: str) -> None:
        """Keep one line."""
        self._count += 1
        if len(self._first) < self._room:
            self._first.append(line)
        else:
            self._last.append(line)

    def skip(self, count: int) -> None:
        """Count lines that were not looked at."""
        self._count += count

    def lines(self) -> list[str]:
        """Return what is kept, oldest first."""
        gap = self._count - len(self._first) - len(self._last)
        return [*self._first, *([f"[... {gap} lines left out ...]"] if gap else []), *self._last]


class OnLine(Protocol):
    """Gets each line worth logging."""

    def __call__(self, stream: Stream, line: str, *, is_error: bool) -> None:
        """Take one line of one stream."""


class OutputRecord:
    """Both streams of one child, as lines: kept, diagnosed, and handed to `on_line(stream, line, is_error)`.

    Lines that match `noise` are dropped before anything sees them. `on_line` is spared floods: of the lines of one second
    it gets the first LINES_PER_SECOND, then one line with the number left out; all are kept and diagnosed.

    Attributes:
        pid: the child's; -1 until there is one.
    """

    LINES_PER_SECOND = 200

    def __init__(
        self,
        on_line: OnLine,
        noise: re.Pattern[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pid = -1
        self._on_line = on_line
        self._noise = noise
        self._clock = clock
        self._second = -1.0
        self._passed = 0
        self._withheld = 0
        self._words: dict[Stream, LastWords] = {"stdout": LastWords(), "stderr": LastWords()}
        self._diagnoses: dict[Stream, Diagnosis] = {stream: Diagnosis(clock) for stream in STREAMS}
        self._splitters: dict[Stream, LineSplitter] = {
            stream: LineSplitter(partial(self._take, stream), partial(self._skip, stream)) for stream in STREAMS
        }

    def feed(self, stream: Stream, chunk: bytes) -> None:
        """Take bytes of one stream."""
        self._splitters[stream].feed(chunk)

    def end(self, stream: Stream) -> None:
        """End one stream: its last line counts even without a newline."""
        self._splitters[stream].flush()
        self._tell_withheld(stream)

    @property
    def cause(self) -> Cause:
        """The class of the line that `last_error` returns."""
        return self._telling().cause

    @property
    def last_error(self) -> str:
        """The line that says best what went wrong, "" when the child said nothing."""
        return self._telling().line or self._splitters["stderr"].pending()

    def last_words(self) -> list[str]:
        """The kept lines of stderr; those of stdout when stderr has none."""
        for stream in ("stderr", "stdout"):
            pending = self._splitters[stream].pending()
            lines = self._words[stream].lines() + ([pending] if pending else [])
            if lines:
                return lines
        return []

    def _telling(self) -> Diagnosis:
        stderr, stdout = self._diagnoses["stderr"], self._diagnoses["stdout"]
        return stdout if not stderr.line or (stderr.cause == "unknown" and stdout.cause != "unknown") else stderr

    def _take(self, stream: Stream, line: str) -> None:
        if self._noise is not None and self._noise.search(line):
            return
        self._words[stream].add(line)
        is_error = self._diagnoses[stream].read(line)
        now = self._clock()
        if now - self._second >= 1.0:
            self._tell_withheld(stream)
            self._second = now
            self._passed = 0
        if self._passed < self.LINES_PER_SECOND:
            self._passed += 1
            self._on_line(stream, line, is_error=is_error)
        else:
            self._withheld += 1

    def _skip(self, stream: Stream, lines: list[bytes]) -> None:
        self._words[stream].skip(len(lines))
        self._withheld += len(lines)
        self._diagnoses[stream].skip(len(lines))
        for line in telling_lines(lines):
            self._diagnoses[stream].read(line)

    def _tell_withheld(self, stream: Stream) -> None:
        if self._withheld:
            count, self._withheld = self._withheld, 0
            self._on_line(stream, f"[... {count} lines not logged ...]", is_error=False)
