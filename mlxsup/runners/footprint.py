"""What a runner looks like from outside: the memory of its process and of all that came from it, and whether it is stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec
import psutil

from mlxsup.protocol import RunnerMemory
from mlxsup.runners import libproc, procfs

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class Watched(msgspec.Struct, frozen=True):
    """A runner to look at.

    Attributes:
        pid: of its process.
        shares: the bytes that were reserved for it, by device.
        busy: whether it is in use or being loaded.
        told: what it says itself of its memory.
        loaded: whether it has all that it needs to begin with.
    """

    pid: int
    shares: Mapping[str, int]
    busy: bool = False
    told: RunnerMemory | None = None
    loaded: bool = True


class Sight(msgspec.Struct, frozen=True):
    """One look at a runner; bytes of its tree.

    Attributes:
        resident: pages that several of its processes share count once for each.
        stopped: whether its process is stopped (SIGSTOP, a debugger).
        proportional: each shared page is divided among all who have it, as last weighed, with what has come or gone since;
            None where that is not known.
        alone: whether the tree is one process.
    """

    resident: int
    stopped: bool
    proportional: int | None = None
    alone: bool = True

    @property
    def used(self) -> int:
        """What counts."""
        return self.resident if self.proportional is None else self.proportional

    @property
    def needed(self) -> int:
        """What it would take with nobody to share with: a lone process needs all its pages."""
        return self.resident if self.alone else self.used


class Part(msgspec.Struct, frozen=True):
    """One process of a tree as it was weighed: its proportional bytes, and those that were resident then."""

    proportional: int
    resident: int

    def now(self, resident: int) -> int:
        """Return what to count when so much is resident: what came is its own, what went was shared like the rest."""
        if resident >= self.resident:
            return self.proportional + resident - self.resident
        return self.proportional * resident // self.resident


class Study(msgspec.Struct, frozen=True):
    """What a look into the depth has found.

    Attributes:
        members: who belongs to each tree.
        parts: of each tree that was weighed, process by process.
        unsettled: those of the weighed that had a process on its way out: the kernel shows none of its pages any more, and
            counts it among those who share them until it has taken them all from it, some milliseconds for each GiB.
        gone: those that were leaving and exist no more.
    """

    members: Mapping[int, Sequence[int]]
    parts: Mapping[int, Mapping[int, Part]]
    unsettled: Collection[int] = ()
    gone: Collection[int] = ()


class Observer:
    """Looks at the same runners again and again; `close` it in the end.

    `look` costs some microseconds for each process and may be called on the loop where there is Linux's /proc. What takes
    longer is for `study`, off the loop; `overdue` and `unweighed` say for whom it is time, `learn` takes what it has found.
    """

    WALK_BUSY, WALK_IDLE = 2.0, 30.0
    """Seconds after which is asked anew who belongs to a tree; in between a new grandchild does not count yet."""

    TRIFLE, MOVED_SHARE = 32 << 20, 10
    """A tree is weighed again when it has grown or shrunk by more bytes than a trifle, and by one part in so many."""

    WEIGH_AGAIN = 2.0
    """Seconds between two weighings of the same tree for nobody in particular."""

    def __init__(self) -> None:
        self._trees: dict[int, _Tree] = {}
        self._leaving: dict[int, str] = {}

    @property
    def leaving(self) -> dict[int, str]:
        """Processes of trees that are no longer looked at, with their start times: `study` asks whether they still exist."""
        return dict(self._leaving)

    def overdue(self, runners: Collection[Watched], now: float, *, thorough: bool) -> list[int]:
        """Return whose tree is to be walked, and forget all but these runners.

        All are walked in the same moment, so that a machine at rest is woken once for them.
        """
        due, busy, idle = [], now // self.WALK_BUSY, now // self.WALK_IDLE
        for runner in runners:
            tree = self._trees.get(runner.pid)
            if tree is None or (tree.busy_slot != busy if runner.busy or thorough else tree.idle_slot != idle):
                due.append(runner.pid)
        if len(runners) - len(due) < len(self._trees):
            self._forget_all_but({runner.pid for runner in runners})
        return due

    def unweighed(self, pid: int, now: float, *, wanted: bool, thorough: bool) -> bool:
        """Tell whether the proportional memory of a tree is to be found out.

        Args:
            pid: of the runner.
            now: monotonic seconds.
            wanted: it makes a difference: more is resident than was reserved.
            thorough: somebody waits for memory, and is owed the truth however lately it was weighed.
        """
        tree = self._trees.get(pid)
        if tree is None or tree.weightless or (not thorough and now - tree.weighed < self.WEIGH_AGAIN):
            return False
        if tree.parts is None:
            return wanted or thorough
        if not (wanted or thorough):
            return self._owes(tree)
        moved = abs(tree.sight.resident - tree.weighed_resident)
        return tree.doubtful or moved > max(self.TRIFLE, tree.weighed_resident // self.MOVED_SHARE)

    @property
    def doubtful(self) -> bool:
        """Whether any tree that shares pages is to be weighed again, though nobody asks."""
        return any(self._owes(tree) for tree in self._trees.values())

    def _owes(self, tree: _Tree) -> bool:
        """Tell whether its part of shared pages may have changed: who goes leaves them to the others."""
        return tree.doubtful and tree.shared > self.TRIFLE

    def learn(self, found: Study, now: float) -> None:
        """Take what a study has found."""
        for pid in found.gone:
            self._leaving.pop(pid, None)
            self._doubt()
        for pid, members in found.members.items():
            tree = self._trees.get(pid)
            if tree is None:
                self._trees[pid] = tree = _Tree(pid)
                self._doubt()
            elif tree.members != members:
                tree.doubtful = True
                self._leave(set(tree.members).difference(members))
            tree.set_members(members)
            tree.busy_slot, tree.idle_slot = now // self.WALK_BUSY, now // self.WALK_IDLE
            if pid in found.parts:
                tree.set_parts(found.parts[pid])
                tree.doubtful = pid in found.unsettled
                tree.weighed = now

    def look(self, pids: Iterable[int]) -> list[Sight]:
        """Look at the tree below each pid; one that is gone has no memory and is not stopped."""
        return [tree.look() if (tree := self._trees.get(pid)) is not None else Sight(*_glance(pid)) for pid in pids]

    def members(self, pid: int) -> Sequence[int]:
        """Return the tree below a pid as it was walked last."""
        tree = self._trees.get(pid)
        return tree.members if tree is not None else (pid,)

    def close(self) -> None:
        """Forget all."""
        self._forget_all_but(frozenset())
        self._leaving.clear()

    def _forget_all_but(self, pids: Collection[int]) -> None:
        for pid in [pid for pid in self._trees if pid not in pids]:
            tree = self._trees.pop(pid)
            self._leave(tree.members)
            tree.set_members(())
            self._doubt()

    def _leave(self, pids: Iterable[int]) -> None:
        self._leaving.update((pid, started) for pid in pids if (started := procfs.start_time(pid)))

    def _doubt(self) -> None:
        """Who came or went may have shared pages with any other."""
        for tree in self._trees.values():
            tree.doubtful = True


class _Tree:
    """What is known of one runner."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.members: Sequence[int] = ()
        self.busy_slot = self.idle_slot = -1.0
        self.sight = Sight(0, stopped=False)
        self.parts: Mapping[int, Part] | None = None
        self.weighed = float("-inf")
        self.weighed_resident = 0
        self.shared = 0
        self.doubtful = False
        """Whether others may have a part of its pages now that they had not before, or no longer have it."""
        self.weightless = False
        """Whether the system does not tell."""
        self._glasses: dict[int, procfs.Glass] = {}
        self._last: list[tuple[int, bool]] = []

    def set_members(self, members: Sequence[int]) -> None:
        """Look at these processes from now on, the runner's own first."""
        if members == self.members:
            return
        self.members, self._last = members, []
        if procfs.AVAILABLE:
            for pid in self._glasses.keys() - members:
                self._glasses.pop(pid).close()
            self._glasses = {pid: self._glasses.get(pid) or procfs.Glass(pid) for pid in members}

    def set_parts(self, parts: Mapping[int, Part]) -> None:
        """Take a weighing."""
        self.parts, self._last = parts, []
        self.weightless = not parts
        self.weighed_resident = sum(part.resident for part in parts.values())
        self.shared = self.weighed_resident - sum(part.proportional for part in parts.values())

    def look(self) -> Sight:
        """Look at all members; where nothing has changed, the sight is the same object as before."""
        if self._glasses:
            seen = [glass.look() for glass in self._glasses.values()]
        else:
            seen = [_glance(pid) for pid in self.members]
        if seen != self._last:
            self._last = seen
            sizes = dict(zip(self.members, (resident for resident, _ in seen), strict=True))
            self.sight = Sight(sum(sizes.values()), seen[0][1], self._proportional(sizes), len(sizes) == 1)
        return self.sight

    def _proportional(self, sizes: Mapping[int, int]) -> int | None:
        if not self.parts:
            return None
        return sum(part.now(size) if (part := self.parts.get(pid)) else size for pid, size in sizes.items())


def study(walked: Iterable[int], weighed: Iterable[int], leaving: Mapping[int, str] | None = None) -> Study:
    """Walk the trees of some runners, and find out the proportional memory of others. Milliseconds: call it off the loop.

    While one of those who are leaving is on its way out, nothing that is weighed is settled: it may share pages with any.
    """
    left = leaving or {}
    gone = [pid for pid, started in left.items() if not _is_the_same(pid, started)]
    ending = any(_is_ending(pid) for pid in left.keys() - gone)  # before the weighing, during which it may be gone
    weighing = set(weighed)
    members = {pid: _tree(pid) for pid in {*walked, *weighing}}
    parts = {pid: {member: part for member in members[pid] if (part := _part(member))} for pid in weighing}
    unsettled = {
        pid
        for pid, known in parts.items()
        if ending or any(_is_ending(member) for member in members[pid] if member not in known)
    }
    return Study(members, parts, unsettled, gone)


def measure(pid: int) -> int:
    """Return the resident bytes of the tree below `pid`, 0 when it is gone.

    Pages that several of its processes share count once for each. Reads some small files: call it off the loop.
    """
    return sum(_glance(member)[0] for member in _tree(pid))


def _glance(pid: int) -> tuple[int, bool]:
    return procfs.glance(pid) if procfs.AVAILABLE else _glance_by_psutil(pid)


def _part(pid: int) -> Part | None:
    """Weigh one process; None where the system does not tell."""
    resident, proportional = _glance(pid)[0], procfs.proportional(pid)
    return Part(proportional, resident) if resident and proportional is not None else None


def _is_the_same(pid: int, started: str) -> bool:
    """Tell whether a process still exists that started then."""
    try:
        return procfs.is_running(pid) and procfs.start_time(pid) == started
    except OSError:  # a shortage of ours
        return True


def _is_ending(pid: int) -> bool:
    """Tell whether a process still exists that has no memory to be seen."""
    try:
        return procfs.AVAILABLE and procfs.is_running(pid) and not procfs.glance(pid)[0]
    except OSError:  # a shortage of ours: weigh again
        return True


def _tree(pid: int) -> list[int]:
    return procfs.tree(pid) if procfs.AVAILABLE else _tree_by_psutil(pid)


def _tree_by_psutil(pid: int) -> list[int]:
    try:
        return list(dict.fromkeys([pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]))
    except psutil.Error:
        return [pid]


def _glance_by_psutil(pid: int) -> tuple[int, bool]:
    """Return a process's memory, the GPU's part of it too where that is told, and whether it is stopped."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return max(int(process.memory_info().rss), libproc.footprint(pid)), process.status() in _STOPPED
    except psutil.Error:
        return 0, False
