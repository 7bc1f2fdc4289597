"""What outlives the process: which runners a supervisor started, so that the next one can end what a crash left behind.

Each supervisor has a folder of its own in the state directory, with a lock that it holds while it lives and a record that is
replaced atomically. A record that cannot be written or read costs a warning, never a start: the sentinel and the marks are
the first line, this is the second.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from mlxsup.forks import Owner
from mlxsup.runners import marks, procfs
from mlxsup.runners.socketfolder import FOLDER_PREFIX
from mlxsup.statefiles import replace_file

log = logging.getLogger(__name__)

VERSION = 1
SWEEP_LIMIT = 2.0
"""Seconds that a start spends on what an earlier life left."""
LOCKLESS_AGE = 300.0
"""Seconds after which a folder without its lock file is no longer taken for one that is being made."""
_MARK = re.compile(r"[0-9a-f]{16}")
_IN_HOME = re.compile(r"lock|record\.json(\.\d+\.new)?")
_SOCKET = re.compile(r"\d+\.sock")


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


class Records:
    """The record of one living supervisor. All methods block for a moment: call them off the loop, from any thread."""

    def __init__(self, directory: Path, mark: str, folder: str) -> None:
        self._home = directory / mark
        self._record = Record(mark=mark, boot=_boot_id(), folder=folder)
        self._lock: int | None = None
        self._failed = False
        self._closed = False
        self._owner = Owner()
        self._one_at_a_time = threading.Lock()

    def open(self) -> bool:
        """Make the folder, take its lock, write the first record; as `write` in all else."""
        return self.write([])

    def write(self, groups: list[Group], folder: str | None = None) -> bool:
        """Replace the record, wholly or not at all; False when the disk refused it, which is told once until it works.

        `folder` is where the sockets are if that has changed.
        """
        with self._one_at_a_time:
            if self._closed or not self._owner.is_here:
                return True
            try:
                if self._lock is None:
                    self._lock = self._take_home()
                self._record = msgspec.structs.replace(
                    self._record, groups=groups, folder=folder or self._record.folder
                )
                replace_file(self._home / "record.json", msgspec.json.encode(self._record))
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
            if self._lock is not None and self._owner.is_here:
                _remove(self._home, _IN_HOME)
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


def sweep(directory: Path) -> list[int]:
    """End what supervisors that are gone left behind, and remove their folders; returns the pids that were ended.

    A folder is taken for one of ours by its name and by all that is in it: others may keep theirs beside it, locks included.
    Call it off the loop.
    """
    ended: list[int] = []
    try:
        homes = [home for home in directory.iterdir() if _is_ours(home)]
    except OSError:
        return ended
    for home in homes:
        with _if_abandoned(home) as abandoned:
            if abandoned:
                ended += _end_leftovers(home)
                _remove(home, _IN_HOME)
    return ended


def _is_ours(home: Path) -> bool:
    """Whether a supervisor made this folder, and nobody put something of his own in it."""
    if not _MARK.fullmatch(home.name) or home.is_symlink():
        return False
    try:
        return all(_IN_HOME.fullmatch(each.name) for each in home.iterdir())
    except OSError:
        return False


def _remove(folder: Path, ours: re.Pattern[str]) -> None:
    """Remove the files of these names from a folder, and the folder itself if nothing else is in it."""
    with suppress(OSError):
        for each in folder.iterdir():
            if ours.fullmatch(each.name):
                each.unlink(missing_ok=True)
        folder.rmdir()


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
    """Whether a folder that has no lock file is old, and none of its runners has a supervisor that lives.

    One that lives may have lost its lock file to whoever tidies up, or may never have had room on the disk for it.
    """
    try:
        is_old = time.time() - home.stat().st_mtime > LOCKLESS_AGE
    except OSError:
        return False
    if not is_old:
        return False  # being made or being removed
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
        _remove(Path(record.folder), _SOCKET)
    return sorted(ended)


def _is_the_same(group: Group) -> bool:
    """Whether the leader is still the one that was recorded; a pid may belong to somebody else by now."""
    return bool(group.started) and procfs.start_time(group.pgid) == group.started


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
