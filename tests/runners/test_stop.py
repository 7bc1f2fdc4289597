"""How a child is ended: asked first, made to at last, with all that came from it, and not before it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import anyio
import pytest

from mlxsup.runners import marks
from mlxsup.runners import process as process_module
from tests.waiting import LIMIT, until

from .children import LINUX, alive, child, new_mark, python, scripted

LONG = 300.0
"""A grace that nobody waits for."""

POLITE = """
    import os, signal
    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"asked\\n"), os._exit(5)))
    os.write(1, b"up\\n")
    signal.pause()
"""

STUBBORN = """
    import os, signal
    signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"asked\\n"))
    os.write(1, b"up\\n")
    while True:
        signal.pause()
"""


async def test_who_obeys_ends_in_its_own_way() -> None:
    async with child(python(POLITE)) as it:
        await it.heard.line("up")
        with anyio.fail_after(LIMIT):
            assert await it.process.stop(signal.SIGTERM, LONG)
        assert it.process.exited is not None
        assert it.process.exited.code == 5
        await it.heard.line("asked")


async def test_it_is_the_signal_that_was_asked_for() -> None:
    async with child(python(POLITE.replace("SIGTERM", "SIGINT"))) as it:
        await it.heard.line("up")
        assert await it.process.stop(signal.SIGINT, LONG)
        assert it.process.exited is not None
        assert it.process.exited.code == 5


async def test_who_ignores_it_is_killed_after_its_grace_and_not_before() -> None:
    async with child(python(STUBBORN)) as it:
        await it.heard.line("up")
        began = time.monotonic()
        assert await it.process.stop(signal.SIGTERM, 0.3)
        took = time.monotonic() - began
        assert it.process.exited is not None
        assert it.process.exited.signal == signal.SIGKILL
        assert 0.3 <= took < LIMIT
        await it.heard.line("asked")


async def test_without_grace_it_is_killed_at_once() -> None:
    async with child(python(STUBBORN)) as it:
        await it.heard.line("up")
        assert await it.process.stop(signal.SIGTERM, 0)
        assert it.process.exited is not None


async def test_a_stopped_one_is_woken_to_obey() -> None:
    code = POLITE.replace("signal.pause()", "os.kill(os.getpid(), signal.SIGSTOP); signal.pause()")
    async with child(python(code)) as it:
        await it.heard.line("up")
        if LINUX:
            await until(lambda: Path(f"/proc/{it.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        with anyio.fail_after(LIMIT):
            assert await it.process.stop(signal.SIGTERM, LONG)
        assert it.process.exited is not None
        assert it.process.exited.code == 5


async def test_the_whole_group_is_asked() -> None:
    code = """
        import os, signal, sys
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"grandchild asked\\n"), os._exit(0)))
            os.write(1, b"up %d\\n" % os.getpid())
            signal.pause()
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.wait()
        sys.exit(5)
    """
    async with child(python(code)) as it:
        grandchild = await it.heard.number("up")
        assert await it.process.stop(signal.SIGTERM, LONG)
        await it.heard.line("grandchild asked")
        assert not alive(grandchild)


async def test_what_a_wrapper_started_has_its_grace() -> None:
    """The wrapper, as a shell, ends at once, and its server has work to save and something to say of it."""
    code = """
        import os, signal, sys, time
        if os.fork() == 0:
            def save(*_):
                os.write(1, b"asked\\n")
                time.sleep(0.5)
                os.write(1, b"saved\\n")
                os._exit(0)
            signal.signal(signal.SIGTERM, save)
            os.write(1, b"up\\n")
        while True:
            signal.pause()
    """
    async with child(python(code)) as it:
        await it.heard.line("up")
        with anyio.fail_after(LIMIT):
            assert await it.process.stop(signal.SIGTERM, LONG)
        assert [line for _, line in it.heard.lines] == ["up", "asked", "saved"]
        assert it.process.exited is not None
        assert it.process.exited.signal == signal.SIGTERM


async def test_what_a_wrapper_started_has_no_more_than_that() -> None:
    code = """
        import os, signal, sys
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(1, b"up %d\\n" % os.getpid())
        while True:
            signal.pause()
    """
    async with child(python(code)) as it:
        server = await it.heard.number("up")
        began = time.monotonic()
        assert await it.process.stop(signal.SIGTERM, 0.3)
        assert 0.3 <= time.monotonic() - began < LIMIT
        await until(lambda: not alive(server))


async def test_stopping_what_is_gone_is_quick() -> None:
    async with child(python("pass")) as it:
        await it.process.wait()
        with anyio.fail_after(LIMIT):
            assert await it.process.stop(signal.SIGTERM, LONG)
            assert await it.process.stop(signal.SIGTERM, LONG)


async def test_stopping_twice_at_once_is_stopping_once() -> None:
    async with child(python(STUBBORN)) as it:
        await it.heard.line("up")
        with anyio.fail_after(LIMIT):
            assert await asyncio.gather(*(it.process.stop(signal.SIGTERM, 0.2) for _ in range(3))) == [True] * 3


async def test_a_child_that_will_not_go_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that hangs in the kernel: SIGKILL is sent and nothing happens."""
    monkeypatch.setattr(process_module, "KILL_WAIT", 0.1)
    async with child(python(STUBBORN)) as it:
        await it.heard.line("up")
        with monkeypatch.context() as deaf:
            deaf.setattr(it.process, "signal_group", lambda number: None)
            assert not await it.process.stop(signal.SIGTERM, 0)
        assert await it.process.stop(signal.SIGTERM, 0)


class TestSweep:
    async def test_nothing_is_left_of_a_child_that_left_nothing(self) -> None:
        async with child(python("pass")) as it:
            await it.process.wait()
            assert await it.process.sweep() == []

    @pytest.mark.skipif(not LINUX, reason="finds them by their mark")
    @pytest.mark.parametrize("how", ["setsid", "setsid+ignore", "setsid+orphan+ignore", "setsid+nopipes"])
    async def test_a_grandchild_with_a_session_of_its_own_is_found_by_its_mark(self, how: str) -> None:
        async with child(scripted(f"fork=print+{how}; stdout=forked; exit=0")) as it:
            await it.heard.line("forked")
            await it.process.wait()
            grandchild = await it.heard.number("grandchild")
            assert alive(grandchild)
            assert await it.process.sweep() == []
            assert not alive(grandchild)

    @pytest.mark.skipif(not LINUX, reason="finds them by their mark")
    async def test_others_are_left_alone(self) -> None:
        async with child(scripted("fork=print+setsid; stdout=forked; exit=0")) as other:
            await other.process.wait()
            theirs = await other.heard.number("grandchild")
            async with child(python("pass")) as it:
                await it.process.wait()
                await it.process.sweep()
            assert alive(theirs)

    @pytest.mark.skipif(not LINUX, reason="finds them by their mark")
    async def test_what_will_not_go_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with child(scripted("fork=print+setsid; stdout=forked; exit=0")) as it:
            await it.process.wait()
            grandchild = await it.heard.number("grandchild")
            with monkeypatch.context() as deaf:
                deaf.setattr(process_module, "KILL_WAIT", 0.05)
                deaf.setattr(marks, "kill", lambda pids: None)
                assert await it.process.sweep() == [grandchild]


async def members(pgid: int) -> list[int]:
    return await asyncio.to_thread(marks.group_members, pgid)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
class TestMarks:
    async def test_a_process_is_found_by_the_beginning_of_its_mark(self) -> None:
        mark = new_mark()
        async with child(python("print('up', flush=True); import signal; signal.pause()"), mark=f"{mark}.one") as it:
            await it.heard.line("up")
            assert await asyncio.to_thread(marks.marked, mark) == [it.process.pid]
            assert await asyncio.to_thread(marks.marked, f"{mark}.one") == [it.process.pid]
            assert await asyncio.to_thread(marks.marked, f"{mark}.two") == []
            assert await asyncio.to_thread(marks.marked, "no-such-mark") == []
        assert await asyncio.to_thread(marks.marked, mark) == []

    async def test_it_must_be_the_variable_and_not_a_part_of_another(self) -> None:
        mark = new_mark()
        env = {"PATH": os.environ["PATH"], "NOT_" + marks.MARK: mark, "TEXT": f"x {marks.MARK}={mark}"}
        async with child(python("print('up', flush=True); import signal; signal.pause()"), env=env) as it:
            await it.heard.line("up")
            assert await asyncio.to_thread(marks.marked, mark) == []

    async def test_a_group_has_all_that_were_forked_into_it(self) -> None:
        async with child(scripted("fork=print; stdout=forked; hang=")) as it:
            await it.heard.line("forked")
            grandchild = await it.heard.number("grandchild")
            assert sorted(await members(it.process.pid)) == sorted([it.process.pid, grandchild])
            os.kill(it.process.pid, signal.SIGKILL)
            await it.process.wait()
            await it.process.sweep()
            assert await members(it.process.pid) == []

    async def test_zombies_are_no_members(self) -> None:
        code = """
            import os, signal
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            os.write(1, b"zombie %d\\n" % pid)
            signal.pause()
        """
        async with child(python(code)) as it:
            zombie = await it.heard.number("zombie")
            assert zombie not in await members(it.process.pid)

    def test_a_group_that_is_gone_has_no_members(self) -> None:
        assert marks.group_members(2**22 + 5) == []

    def test_killing_who_is_gone_is_fine(self) -> None:
        marks.kill([2**22 + 5])
