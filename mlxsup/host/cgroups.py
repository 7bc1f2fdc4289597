"""The memory limits of the control groups this process is in, versions 1 and 2, its own group and all above it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

_UNLIMITED: Final = 2**62
"""Version 1 writes a number near 2^63 where there is no limit."""

_SMALL_FILE: Final = 16 << 10

_OCTAL = re.compile(r"\\([0-7]{3})")


class Limit(msgspec.Struct, frozen=True):
    """One group with a limit; `used` leaves out what the kernel gives back at once (inactive file cache). Bytes.

    `usage` and `stat` are the paths of the files in which the kernel says how much it is at any time, `cache` the line of
    the second that counts what it gives back.
    """

    group: str
    limit: int
    used: int
    usage: str = ""
    stat: str = ""
    cache: str = ""

    def left(self, enough: int) -> int:
        """Return what is left now, or any figure from `enough` up: the costly half of the question is asked only below that.

        Raises:
            OSError, ValueError: the group is not there any more.
        """
        left = self.limit - int(read_now(self.usage))
        return left if left >= enough else min(self.limit, left + _given_back(read_now(self.stat).decode(), self.cache))


class _Mount(NamedTuple):
    version: int
    root: str
    point: str


def limits(root: Path = Path("/")) -> tuple[list[Limit], list[str]]:
    """Return every limit that holds for this process, and a line for each file that could not be understood.

    `memory.high` counts as `memory.max` does: beyond it a group is throttled until it hardly runs.

    Args:
        root: where `proc` and the mounted groups are looked for, for tests.
    """
    reasons: list[str] = []
    found = [
        limit
        for mount, group in _groups(root, reasons)
        for limit in (_limits_v1 if mount.version == 1 else _limits_v2)(root, mount, group, reasons)
    ]
    return found, reasons


# Where the groups are


def _groups(root: Path, reasons: list[str]) -> Iterator[tuple[_Mount, tuple[str, ...]]]:
    """Pair each mounted hierarchy that knows of memory with our group in it, as path below the mount."""
    mounts = _mounts(_text(root / "proc/self/mountinfo", reasons) or "")
    for line in (_text(root / "proc/self/cgroup", reasons) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else 0
        candidates = [mount for mount in mounts if mount.version == version]
        if candidates:
            yield _place(path, candidates)


def _place(path: str, mounts: list[_Mount]) -> tuple[_Mount, tuple[str, ...]]:
    """Find our group below the mount that shows it.

    A container may see its own group alone, as the root of the mount; with a view from outside (`/../..`, or the host's path
    where the mount shows something else) what is mounted is all that can be known.
    """
    ours = _parts(path)
    for mount in sorted(mounts, key=lambda one: -len(one.root)):
        above = _parts(mount.root)
        if ours[: len(above)] == above and ".." not in ours:
            return mount, ours[len(above) :]
    return mounts[0], ()


def _mounts(text: str) -> list[_Mount]:
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kind) < 3:
            continue
        version = 2 if kind[0] == "cgroup2" else 1 if kind[0] == "cgroup" and "memory" in kind[2].split(",") else 0
        if version:
            found.append(_Mount(version, _unescape(fields[3]), _unescape(fields[4])))
    return found


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _unescape(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)


def _levels(root: Path, mount: _Mount, group: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Walk from our own group up to the one that is mounted."""
    base = root.joinpath(*_parts(mount.point))
    for depth in range(len(group), -1, -1):
        yield "/" + "/".join(group[:depth]), base.joinpath(*group[:depth])


# What a group says


def _limits_v2(root: Path, mount: _Mount, group: tuple[str, ...], reasons: list[str]) -> Iterator[Limit]:
    for name, folder in _levels(root, mount, group):
        found = [_number(folder / file, reasons) for file in ("memory.max", "memory.high")]
        known = [limit for limit in found if limit is not None]
        if known:
            yield _limit(name, folder, min(known), "memory.current", "inactive_file", reasons)


def _limits_v1(root: Path, mount: _Mount, group: tuple[str, ...], reasons: list[str]) -> Iterator[Limit]:
    for name, folder in _levels(root, mount, group):
        own = folder == root.joinpath(*_parts(mount.point), *group)
        if not own and _number(folder / "memory.use_hierarchy", reasons) == 0:
            continue  # what its children use is not counted there
        limit = _number(folder / "memory.limit_in_bytes", reasons)
        if limit is not None and limit < _UNLIMITED:
            yield _limit(name, folder, limit, "memory.usage_in_bytes", "total_inactive_file", reasons)


def _limit(name: str, folder: Path, limit: int, usage: str, cache: str, reasons: list[str]) -> Limit:
    used = _number(folder / usage, reasons)
    if used is None:
        reasons.append(f"{folder / usage}: not there; taken for 0")
        return Limit(name, limit, 0)
    stat = folder / "memory.stat"
    used = max(0, used - _given_back(_text(stat, reasons) or "", cache))
    return Limit(name, limit, used, str(folder / usage), str(stat), cache)


def _given_back(stat: str, cache: str) -> int:
    match = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
    return int(match[1]) if match else 0


def read_now(path: str) -> bytes:
    """Read one of the kernel's own small files, without the layers of a file object: it is done every second.

    Raises:
        OSError: it is not there, or not ours to read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, _SMALL_FILE)
    finally:
        os.close(file)


def _number(path: Path, reasons: list[str]) -> int | None:
    """Read a number; None where there is no such file or it says `max`."""
    text = _text(path, reasons)
    if text is None or text.strip() == "max":
        return None
    if not text.strip().isdecimal():
        reasons.append(f"{path}: no number: {text.strip()[:40]!r}")
        return None
    return int(text)


def _text(path: Path, reasons: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reasons.append(f"{path}: cannot be read: {error.strerror}")
        return None
