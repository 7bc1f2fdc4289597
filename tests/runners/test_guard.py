"""The supervisor's end of the sentinel: there before the first runner, replaced when it dies, gone at the end."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import resource
import signal
import stat
import sys
import termios
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import anyio
import psutil
import pytest

from mlxsup.errors import LoadFailed
from mlxsup.runners import guard as guard_module
from mlxsup.runners import procfs
from mlxsup.runners.guard import Guard
from tests.waiting import LIMIT, until

from .children import LINUX, alive, child, python

SLEEPER = python("print('up', flush=True); import signal; signal.pause()")


@asynccontextmanager
async def guarding() -> AsyncIterator[Guard]:
    made = Guard(lambda: None)
    try:
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await made.close()


def sentinels() -> list[int]:
    """The pids of the sentinels that this program has."""
    found = []
    for process in psutil.Process().children():
        try:
            if any("mlxsup.runners.sentinel" in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def the_sentinel() -> int:
    """The pid of the one sentinel; for a moment after its start nobody sees what it is."""
    await until(lambda: len(sentinels()) == 1)
    return sentinels()[0]


async def test_there_is_none_before_it_is_needed() -> None:
    async with guarding():
        assert sentinels() == []


async def test_there_is_one_however_often_it_is_asked_for() -> None:
    async with guarding() as guard:
        await asyncio.gather(*(guard.ready() for _ in range(5)))
        await guard.ready()
        await the_sentinel()
    assert sentinels() == []


async def test_marks_are_different_and_begin_alike() -> None:
    async with guarding() as guard, guarding() as other:
        marks = {guard.new_mark() for _ in range(100)}
        assert len(marks) == 100
        assert all(mark.startswith(f"{guard.mark}.") for mark in marks)
        assert guard.mark != other.mark


class TestFolder:
    async def test_it_is_private_and_goes_with_the_guard(self) -> None:
        async with guarding() as guard:
            assert stat.S_IMODE(guard.folder.stat().st_mode) == 0o700
            (guard.folder / "1.sock").touch()
        assert not guard.folder.exists()

    async def test_two_have_two(self) -> None:
        async with guarding() as guard, guarding() as other:
            assert guard.folder != other.folder

    async def test_one_that_was_tidied_away_is_there_again_when_it_is_asked_for(self) -> None:
        changes: list[None] = []
        guard = Guard(lambda: changes.append(None))
        try:
            before = guard.folder
            before.rmdir()
            assert guard.sockets() == before
            assert before.is_dir()
            assert changes == []
        finally:
            await guard.close()

    @pytest.mark.parametrize("replaced", [False, True])
    async def test_where_it_is_now_the_sentinel_knows_and_its_successor(
        self, monkeypatch: pytest.MonkeyPatch, replaced: bool
    ) -> None:
        changes: list[None] = []
        guard = Guard(lambda: changes.append(None))
        try:
            await guard.ready()
            before = guard.folder
            before.rmdir()
            before.touch()  # somebody took its name
            now = guard.sockets()
            assert now.is_dir()
            assert now != before
            assert changes == [None]
            (now / "1.sock").touch()
            if replaced:
                await _killed_and_replaced(guard)
            guard._drop_pipe()  # as the kernel does when this program is killed
            await until(lambda: not now.exists())
            before.unlink()
        finally:
            await guard.close()


class TestDeath:
    """The sentinel itself is killed, by somebody who cleans up or by the kernel that needs memory."""

    async def test_it_is_replaced_without_being_asked_for(self) -> None:
        async with guarding() as guard:
            await guard.ready()
            await _killed_and_replaced(guard)

    async def test_a_runner_does_not_wait_for_that(self) -> None:
        """Before each spawn there is a living one, however short the life of the last one was."""
        async with guarding() as guard:
            await guard.ready()
            first = await the_sentinel()
            os.kill(first, signal.SIGKILL)
            while guard._sentinel is None or guard._sentinel.pid == first:
                await guard.ready()
                await anyio.sleep(0.002)
            await the_sentinel()

    async def test_closing_while_one_is_replaced_leaves_none(self) -> None:
        for asked in (True, False):
            async with guarding() as guard:
                await guard.ready()
                first = await the_sentinel()
                os.kill(first, signal.SIGKILL)
                await until(lambda first=first: first not in sentinels())  # type: ignore[misc]
                if asked:
                    await guard.ready()
            await anyio.sleep(guard_module.MIN_LIFE + 0.2)  # what is looked for is that none comes
            assert sentinels() == []

    async def test_its_successor_knows_what_it_watched(self) -> None:
        async with guarding() as guard, child(SLEEPER) as runner:
            await runner.heard.line("up")
            await guard.ready()
            guard.watch(runner.process.pid)
            await _killed_and_replaced(guard)
            guard._drop_pipe()  # as the kernel does when this program is killed
            with anyio.fail_after(LIMIT):
                assert (await runner.process.wait()).signal == signal.SIGKILL

    async def test_what_keeps_it_from_being_replaced_may_pass(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """No descriptors are left for a while: it is tried again without being asked for."""
        monkeypatch.setattr(guard_module, "TRY_AGAIN", 0.05)
        monkeypatch.setattr(guard_module, "MIN_LIFE", 0.0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with guarding() as guard, child(SLEEPER) as runner:
            await runner.heard.line("up")
            await guard.ready()
            guard.watch(runner.process.pid)
            first = await the_sentinel()
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                os.kill(first, signal.SIGKILL)
                await until(lambda: "no sentinel" in caplog.text)
                await anyio.sleep(0.3)  # some tries in vain
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert caplog.text.count("no descriptors left") == 1
            await until(lambda: guard._sentinel is not None and guard._sentinel.pid != first)
            assert await the_sentinel() != first
            guard._drop_pipe()
            with anyio.fail_after(LIMIT):
                assert (await runner.process.wait()).signal == signal.SIGKILL

    async def test_one_that_was_stopped_is_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a debugger, or by mistake: it would do nothing when it is needed."""
        monkeypatch.setattr(guard_module, "PING_EVERY", 0.1)
        monkeypatch.setattr(guard_module, "SILENT_PINGS", 10)
        async with guarding() as guard:
            await guard.ready()
            first = await the_sentinel()
            os.kill(first, signal.SIGSTOP)
            await until(lambda: guard._sentinel is not None and guard._sentinel.pid != first)
            assert await the_sentinel() != first

    async def test_one_that_does_its_work_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard_module, "PING_EVERY", 0.1)
        monkeypatch.setattr(guard_module, "SILENT_PINGS", 10)
        async with guarding() as guard:
            await guard.ready()
            first = guard._sentinel
            assert first is not None
            await until(lambda: first.activity.count >= 15, 2 * LIMIT)
            assert guard._sentinel is first

    async def test_to_tell_a_dead_one_something_is_no_failure(self) -> None:
        async with guarding() as guard, child(SLEEPER) as runner:
            await guard.ready()
            os.kill(await the_sentinel(), signal.SIGKILL)
            guard.watch(runner.process.pid)
            guard.forget(runner.process.pid)


async def _killed_and_replaced(guard: Guard) -> None:
    first = await the_sentinel()
    os.kill(first, signal.SIGKILL)
    await until(lambda: guard._sentinel is not None and guard._sentinel.pid != first)
    assert await the_sentinel() != first


class TestWithoutProc:
    """As on macOS: psutil finds the marked ones, and nothing tells of the supervisor's end but the pipe."""

    async def test_marked_ones_are_ended_and_the_folder_removed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sentinel starts without installed packages, and this one is installed apart from psutil."""
        unknown = "from mlxsup.runners import procfs; procfs.AVAILABLE = False; procfs._fields = lambda pid: []"
        monkeypatch.setattr(procfs, "AVAILABLE", False)
        monkeypatch.setattr(guard_module, "_MAIN", f"{unknown}; {guard_module._MAIN}")
        async with guarding() as guard, child(SLEEPER, mark=guard.new_mark()) as runner:
            await runner.heard.line("up")
            await guard.ready()
            (guard.folder / "1.sock").touch()
            guard._drop_pipe()
            with anyio.fail_after(LIMIT):
                assert (await runner.process.wait()).signal == signal.SIGKILL
            await until(lambda: not guard.folder.exists())


class TestClose:
    async def test_what_it_watched_is_not_ended_by_an_orderly_end(self) -> None:
        async with child(SLEEPER) as runner:
            await runner.heard.line("up")
            async with guarding() as guard:
                await guard.ready()
                guard.watch(runner.process.pid)
            assert sentinels() == []
            assert alive(runner.process.pid)

    async def test_twice_is_once(self) -> None:
        async with guarding() as guard:
            await guard.ready()
            await guard.close()
            await guard.close()

    async def test_a_sentinel_that_does_not_listen_does_not_hold_it_up(self) -> None:
        """It was stopped, by a debugger or by mistake."""
        async with guarding() as guard:
            await guard.ready()
            pid = await the_sentinel()
            os.kill(pid, signal.SIGSTOP)
            with anyio.fail_after(LIMIT):
                await guard.close()
            assert sentinels() == []


async def test_a_disk_that_hangs_at_the_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard_module, "LAST_LIMIT", 0.1)
    hangs, done = threading.Event(), threading.Event()
    async with guarding() as guard:
        await guard.ready()
        with anyio.fail_after(LIMIT):
            await guard.close(hangs.wait, done.set)
        assert done.is_set()
        assert [record.message for record in caplog.records if "a disk hangs" in record.message]
    hangs.set()
    await until(lambda: not [one for one in threading.enumerate() if "Event.wait" in one.name])


async def test_it_notes_which_groups_are_watched() -> None:
    changes = []
    guard = Guard(lambda: changes.append(sorted(guard.groups)))
    try:
        async with child(SLEEPER) as runner:
            pid = runner.process.pid
            guard.watch(pid)
            guard.forget(pid)
            guard.forget(pid)
        assert changes == [[pid], []]
    finally:
        await guard.close()


async def test_a_sentinel_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be spawned then: nobody would clean up after it."""
    async with guarding() as guard:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nowhere/python")
            with pytest.raises(LoadFailed):
                await guard.ready()
        await guard.ready()
        await the_sentinel()


@pytest.mark.skipif(not LINUX, reason="looks into a pipe")
async def test_orders_are_not_lost_while_it_does_not_read() -> None:
    """More than a pipe holds, for a sentinel that was stopped: it reads them later, or its successor does."""
    async with guarding() as guard, child(SLEEPER) as runner:
        await runner.heard.line("up")
        await guard.ready()
        pid = await the_sentinel()
        os.kill(pid, signal.SIGSTOP)
        for number in range(10_000):
            guard.watch(2**22 + number)
            guard.forget(2**22 + number)
        guard.watch(runner.process.pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        await until(_read_up(guard))
        guard._drop_pipe()
        with anyio.fail_after(LIMIT):
            assert (await runner.process.wait()).signal == signal.SIGKILL


def _read_up(guard: Guard) -> Callable[[], bool]:
    """Whether a sentinel has read all that it was told, and nothing more came, at twenty looks in a row."""
    looks = 0

    def empty() -> bool:
        nonlocal looks
        count = array.array("i", [1])
        if guard._pipe is not None and sentinels():
            fcntl.ioctl(guard._pipe, termios.FIONREAD, count)
        looks = looks + 1 if count[0] == 0 else 0
        return looks >= 20

    return empty
