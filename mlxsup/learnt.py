"""What was learnt of models, their memory and the time of their loads, in one file that supervisors share."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from mlxsup.statefiles import replace_file

log = logging.getLogger(__name__)

VERSION: Final = 1
LEARNT_FILE: Final = "learnt.json"
LOCK_FILE: Final = "learnt.lock"
MOST_LESSONS: Final = 1000
"""Models of which something is kept; the ones loaded last."""
LOCK_WAIT: Final = 1.0
"""Seconds to wait for another supervisor that writes; one that was stopped while it did is not waited for."""


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What was learnt of one model and its files: the most bytes it used, seconds of its loads, when (Unix time)."""

    memory: int = 0
    seconds: float = 0.0
    at: float = 0.0

    def followed_by(self, later: Lesson) -> Lesson:
        """Return what is known after both: the most memory, and the later time of loads where there is one."""
        return Lesson(memory=max(self.memory, later.memory), seconds=later.seconds or self.seconds, at=later.at)


class _Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of any version has."""

    version: int = VERSION


class Lessons(msgspec.Struct, frozen=True, kw_only=True):
    """The file of what was learnt."""

    version: int = VERSION
    models: dict[str, Lesson] = {}


class Learnt:
    """What was learnt of models, in one file that supervisors share.

    `get` and `keep` wait for no disk; the other methods block: call them off the loop.
    A file that cannot be read costs a warning and is replaced by the next one that is written; one of another version, as an
    earlier or later mlxsup leaves it, is set aside before that.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEARNT_FILE
        self._foreign: int | None = None
        """The version of the file, where it is not ours."""
        self._lessons: dict[str, Lesson] = {}
        self._unwritten: dict[str, Lesson] = {}
        self._failed = False
        self._changing = threading.Lock()
        self._writing = threading.Lock()

    def open(self) -> None:
        """Read what earlier lives have learnt."""
        self._lessons = self._read()
        if self._foreign is not None:
            log.warning(
                "%s is of version %d, and only %d is known here: it is not used, and kept as %s once something is learnt",
                *(self.path, self._foreign, VERSION, self._aside()),
            )

    def get(self, key: str) -> Lesson | None:
        """Return what is known under a key."""
        return self._lessons.get(key)

    def keep(self, key: str, lesson: Lesson) -> None:
        """Keep a lesson, what is 0 in it as it was, from this moment on; `write` makes it last."""
        with self._changing:
            self._lessons = _after(self._lessons, {key: lesson})
            self._unwritten = _after(self._unwritten, {key: lesson})

    def write(self) -> None:
        """Write down what was kept since the last time, if anything, beside others' lessons."""
        with self._writing:
            if self._unwritten:
                self._write()

    def _write(self) -> None:
        fresh: dict[str, Lesson] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _alone(self.path.with_name(LOCK_FILE)):
                found = self._read()
                with self._changing:
                    fresh, self._unwritten = self._unwritten, {}
                    self._lessons = _after(self._lessons | found, fresh)
                    latest = sorted(self._lessons.items(), key=lambda item: item[1].at)[-MOST_LESSONS:]
                if self._foreign is not None:
                    self.path.replace(self._aside())
                    log.warning("%s is of version %d: it is kept as %s", self.path, self._foreign, self._aside())
                replace_file(self.path, msgspec.json.encode(Lessons(models=dict(latest))))
        except OSError as error:
            with self._changing:
                self._unwritten = _after(fresh, self._unwritten)
            if not self._failed:
                log.warning("what was learnt of models is not kept, for now: %s", error)
            self._failed = True
        else:
            self._failed = False

    def _read(self) -> dict[str, Lesson]:
        self._foreign = None
        try:
            content = self.path.read_bytes()
            version = msgspec.json.decode(content, type=_Versioned).version
            if version != VERSION:
                self._foreign = version
                return {}
            return msgspec.json.decode(content, type=Lessons).models
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s cannot be read (%s); what is in it is learnt anew", self.path, error)
            return {}

    def _aside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.version-{self._foreign}")


def _after(first: Mapping[str, Lesson], then: Mapping[str, Lesson]) -> dict[str, Lesson]:
    """Return the lessons of both, as `keep` puts them together."""
    return {**first, **{key: first.get(key, Lesson()).followed_by(lesson) for key, lesson in then.items()}}


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep other supervisors from writing meanwhile; without their consent after a while, or where files cannot be locked."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up_at = time.monotonic() + LOCK_WAIT
        with suppress(OSError):  # a file system that knows no locks
            while not _takes(handle) and time.monotonic() < give_up_at:
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _takes(handle: int) -> bool:
    """Take the lock unless another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
