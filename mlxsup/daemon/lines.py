"""Writes log lines to a descriptor without ever waiting for whoever reads it.

As long as the reader keeps up, a line is out before the call that logged it returns: nothing is lost, whatever comes next.
When it does not, a thread takes over until it has caught up; what is too much to hold is counted, and the log says so.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from typing import Final

_MAX_HELD: Final = 4 << 20
"""Bytes of lines that wait for a slow reader."""
_PIECE: Final = 4096
"""What a pipe that is writable takes at least without blocking."""
_FLUSH_LIMIT: Final = 2.0
"""Seconds that the end of the program waits for a slow reader."""
_LOOK: Final = 1.0
_PAUSE: Final = 0.01


class LineHandler(logging.Handler):
    """Sends each record, formatted, as one line to `descriptor`, which it does not own."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._held: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._writer: threading.Thread | None = None
        self._caught_up = threading.Condition(self.lock)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or keep it for the thread, or count it."""
        try:
            line = self._line(record)
            if self._size + len(line) > _MAX_HELD:
                self._lost += 1
                return
            self._tell_lost()
            self._hold(line)
            if self._writer is None and not self._write_what_fits():
                self._hand_over()
        except Exception:  # noqa: BLE001 - as every handler of the standard library: whoever logs is not to blame
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all is written, at most some seconds."""
        with self._caught_up:
            if self._writer is None:
                self._tell_lost()
                self._write_what_fits()
            self._caught_up.wait_for(lambda: self._writer is None, _FLUSH_LIMIT)

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"

    def _tell_lost(self) -> None:
        if self._lost:
            told = "%d lines of log were lost: they could not be written in time"
            count, self._lost = self._lost, 0
            self._hold(self._line(logging.LogRecord(__name__, logging.WARNING, __file__, 0, told, (count,), None)))

    def _hold(self, line: bytes) -> None:
        self._held.append(line)
        self._size += len(line)

    def _write_what_fits(self) -> bool:
        """Write without blocking; tell whether that was all."""
        while self._held:
            if not self._is_writable(0) or not self._took(self._write(self._held[0][:_PIECE])):
                return False
        return True

    def _hand_over(self) -> None:
        writer = threading.Thread(target=self._catch_up, name="mlxsup log", daemon=True)
        writer.start()
        self._writer = writer

    def _catch_up(self) -> None:
        """Write all that is held; only the writing itself is done without the lock."""
        while True:
            with self._caught_up:
                if not self._held:
                    self._writer = None
                    self._caught_up.notify_all()
                    return
                piece = self._held[0][:_PIECE]
            taken = self._write(piece) if self._is_writable(_LOOK) else 0
            with self._caught_up:
                moved = self._took(taken)
            if not moved:
                time.sleep(_PAUSE)

    def _is_writable(self, seconds: float) -> bool:
        return bool(select.select([], [self._descriptor], [], seconds)[1])

    def _write(self, piece: bytes) -> int | None:
        """Return how much was taken; None when it cannot be written at all, as on a full disk."""
        try:
            return os.write(self._descriptor, piece)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def _took(self, count: int | None) -> bool:
        """Note how much of the first line is out; tell whether anything moved."""
        line = self._held.popleft()
        self._size -= len(line)
        if count is None:
            self._lost += 1
            return True
        if rest := line[count:]:
            self._held.appendleft(rest)
            self._size += len(rest)
        return count > 0
