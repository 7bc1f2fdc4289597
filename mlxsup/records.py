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
import re
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
LOCKLESS_AGE = 300.0
"""Seconds after which a folder without its lock file is no longer taken for one that is being made."""
_OURS = re.compile(r"[0-9a-f]{16}")
_RECORD = re.compile(r"record\.json(\.\d+\.new)?")


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
        self._unwritten = False
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
            old = self._lessons.get(key, Lesson())
            self._lessons[key] = Lesson(
                memory=max(lesson.memory, old.memory), seconds=lesson.seconds or old.seconds, at=lesson.at
            )
            self._unwritten = True

    def write(self) -> None:
        """Write down what was kept since the last time, if anything, beside others' lessons."""
        with self._writing:
            if self._unwritten:
                self._write()

    def _write(self) -> None:
        found = self._read()
        with self._changing:
            self._lessons = found | self._lessons
            self._unwritten = False
            latest = sorted(self._lessons.items(), key=lambda item: item[1].at)[-MOST_LESSONS:]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._foreign is not None:
                self.path.replace(self._aside())
                log.warning("%s is of version %d: it is kept as %s", self.path, self._foreign, self._aside())
            _replace(self.path, msgspec.json.encode(Lessons(models=dict(latest))))
        except OSError as error:
            self._unwritten = True
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
    except FileNotFoundError:
        yield _is_lost(home)
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _is_lost(home: Path) -> bool:
    """Whether a folder that has no lock file is one of ours, is old, and none of its runners has a supervisor that lives.

    One that lives may have lost its lock file to whoever tidies up, or may never have had room on the disk for it.
    """
    try:
        is_old = time.time() - home.stat().st_mtime > LOCKLESS_AGE
        is_ours = bool(_OURS.fullmatch(home.name)) and all(_RECORD.fullmatch(each.name) for each in home.iterdir())
    except OSError:
        return False
    if not (is_old and is_ours):
        return False  # being made or being removed, or somebody else's
    supervisors = {marks.supervisor_of(pid) for pid in marks.marked(f"{home.name}.")}
    return all(pid is not None and not procfs.is_running(pid) for pid in supervisors)


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
