"""What outlives the process: which runners a supervisor started, so that the next one can end what a crash left behind; and
what was learnt of models, their memory and the time of their loads.

Each supervisor has a folder of its own in the state directory, with a lock that it holds while it lives and a record that is
replaced atomically. A record that cannot be written or read costs a warning, never a start: the sentinel and the marks are
the first line, this is the second.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from mlxsup.runners import marks, procfs
from mlxsup.runners.guard import FOLDER_PREFIX

log = logging.getLogger(__name__)

VERSION = 1
LEARNT_FILE = "learnt.json"
MOST_LESSONS = 1000
"""Models of which something is kept; the ones loaded last."""
SWEEP_LIMIT = 2.0
"""Seconds that a start spends on what an earlier life left."""


class Group(msgspec.Struct, frozen=True):
    """One runner: its process group, and the start time that tells its leader from a later process of that number."""

    pgid: int
    started: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor writes down. `boot` is the system's boot id: pids of another boot mean nothing."""

    version: int = VERSION
    mark: str
    boot: str = ""
    folder: str = ""
    groups: list[Group] = []


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What was learnt of one model and its files: the most bytes it used, seconds of its loads, when (Unix time)."""

    memory: int = 0
    seconds: float = 0.0
    at: float = 0.0


class Lessons(msgspec.Struct, frozen=True, kw_only=True):
    """The file of what was learnt."""

    version: int = VERSION
    models: dict[str, Lesson] = {}


class Learnt:
    """What was learnt of models, in one file that supervisors share. All methods but `get` block: call them off the loop.

    A file that cannot be read costs a warning and is replaced by the next one that is written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LEARNT_FILE
        self._lessons: dict[str, Lesson] = {}
        self._adding = threading.Lock()

    def open(self) -> None:
        """Read what earlier lives have learnt."""
        self._lessons = self._read()

    def get(self, key: str) -> Lesson | None:
        """Return what is known under a key."""
        return self._lessons.get(key)

    def add(self, key: str, lesson: Lesson) -> None:
        """Keep a lesson, what is 0 in it as it was, and write all down, others' lessons included."""
        with self._adding:
            self._add(key, lesson)

    def _add(self, key: str, lesson: Lesson) -> None:
        self._lessons = self._read() | self._lessons
        old = self._lessons.get(key, Lesson())
        self._lessons[key] = Lesson(
            memory=max(lesson.memory, old.memory), seconds=lesson.seconds or old.seconds, at=lesson.at
        )
        latest = sorted(self._lessons.items(), key=lambda item: item[1].at)[-MOST_LESSONS:]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(self._path, msgspec.json.encode(Lessons(models=dict(latest))))
        except OSError as error:
            log.warning("what was learnt of models is not kept: %s", error)

    def _read(self) -> dict[str, Lesson]:
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=Lessons)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s cannot be read (%s); what is in it is learnt anew", self._path, error)
            return {}
        return dict(found.models) if found.version == VERSION else {}


def state_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Return where state is kept: systemd's $STATE_DIRECTORY, else $XDG_STATE_HOME/mlxsup, else ~/.local/state/mlxsup."""
    found = os.environ if environ is None else environ
    if given := found.get("STATE_DIRECTORY"):
        return Path(given.partition(":")[0])
    base = found.get("XDG_STATE_HOME")
    return Path(base) / "mlxsup" if base else Path(found.get("HOME", "/tmp")) / ".local/state/mlxsup"  # noqa: S108


class Records:
    """The record of one living supervisor. All methods block for a moment: call them off the loop, from any thread."""

    def __init__(self, directory: Path, mark: str, folder: str) -> None:
        self._home = directory / mark
        self._record = Record(mark=mark, boot=_boot_id(), folder=folder)
        self._lock: int | None = None
        self._failed = False
        self._closed = False
        self._one_at_a_time = threading.Lock()

    def open(self) -> bool:
        """Make the folder, take its lock, write the first record; as `write` in all else."""
        return self.write([])

    def write(self, groups: list[Group]) -> bool:
        """Replace the record, wholly or not at all; False when the disk refused it, which is told once until it works."""
        with self._one_at_a_time:
            if self._closed:
                return True
            try:
                if self._lock is None:
                    self._lock = self._take_home()
                record = msgspec.structs.replace(self._record, groups=groups)
                _replace(self._home / "record.json", msgspec.json.encode(record))
            except OSError as error:
                self._note_failure(error)
                return False
            if self._failed:
                log.info("the record of runners is kept again")
            self._failed = False
            return True

    def close(self) -> None:
        """Remove the folder; nothing is left to find."""
        with self._one_at_a_time:
            self._closed = True
            if self._lock is not None:
                shutil.rmtree(self._home, ignore_errors=True)
            self._release()

    def _take_home(self) -> int:
        self._home.mkdir(parents=True, mode=0o700, exist_ok=True)
        lock = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        return lock

    def _note_failure(self, error: OSError) -> None:
        if not self._failed:
            log.warning("no record of runners is kept, for now: %s", error)
        self._failed = True
        if not self._home.exists():  # somebody tidied up; the next try makes it anew
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _replace(path: Path, content: bytes) -> None:
    """Write a file wholly or not at all; what was begun in vain is removed, as a full disk needs it."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def sweep(directory: Path) -> list[int]:
    """End what supervisors that are gone left behind, and remove their folders; returns the pids that were ended.

    Call it off the loop.
    """
    ended: list[int] = []
    try:
        homes = [home for home in directory.iterdir() if home.is_dir()]
    except OSError:
        return ended
    for home in homes:
        with _if_abandoned(home) as abandoned:
            if abandoned:
                ended += _end_leftovers(home)
                shutil.rmtree(home, ignore_errors=True)
    return ended


@contextmanager
def _if_abandoned(home: Path) -> Iterator[bool]:
    """Hold the folder's lock if it is free: then nobody who uses the folder lives."""
    try:
        lock = os.open(home / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False  # being made or being removed
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _end_leftovers(home: Path) -> list[int]:
    try:
        record = msgspec.json.decode((home / "record.json").read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("the record in %s cannot be read (%s); looking for its processes by their mark", home, error)
        record = Record(mark=home.name)
    groups = [group for group in record.groups if record.boot == _boot_id() and _is_the_same(group)]
    ended: set[int] = set()
    limit = time.monotonic() + SWEEP_LIMIT
    while True:
        left = {*marks.marked(f"{record.mark}.")}
        for group in groups:
            left |= {*marks.group_members(group.pgid)}
        if not left or time.monotonic() > limit:
            break
        ended |= left
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    if ended:
        log.warning("ended what an earlier supervisor left: %s", sorted(ended))
    if Path(record.folder).name.startswith(FOLDER_PREFIX):
        shutil.rmtree(record.folder, ignore_errors=True)
    return sorted(ended)


def _is_the_same(group: Group) -> bool:
    """Whether the leader is still the one that was recorded; a pid may belong to somebody else by now."""
    return bool(group.started) and procfs.start_time(group.pgid) == group.started


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
