"""How a child starts, what it is given, what it leaves to read, and how its end is noticed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import anyio
import pytest

from mlxsup.runners import process as process_module
from mlxsup.runners.marks import MARK
from tests.waiting import LIMIT

from .children import ENV, LINUX, alive, child, python, scripted

WIDE = 5.0
"""Seconds that pass for "at once" on a busy machine, and are well below any time-out that could hide a fault."""


class TestExit:
    async def test_an_exit_code(self) -> None:
        before = time.monotonic()
        async with child(python("import sys; print('bye', file=sys.stderr); sys.exit(3)")) as it:
            record = await it.process.wait()
        assert (record.code, record.signal) == (3, None)
        assert before <= record.at <= time.monotonic()
        assert 0 < record.uptime <= time.monotonic() - before
        assert record.last_words == ["bye"]
        assert record.describe() == "exit code 3: bye"
        assert record.details()["exit_code"] == 3
        assert record.details()["signal"] is None

    async def test_success_is_an_exit_like_any_other(self) -> None:
        async with child(python("pass")) as it:
            record = await it.process.wait()
        assert (record.code, record.signal, record.describe()) == (0, None, "exit code 0")

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM", "SIGABRT"])
    async def test_a_signal(self, name: str) -> None:
        async with child(python(f"import os, signal; os.kill(os.getpid(), signal.{name})")) as it:
            record = await it.process.wait()
        assert (record.code, record.signal) == (None, signal.Signals[name])
        assert record.describe() == name
        assert record.details()["signal"] == name

    @pytest.mark.skipif(not LINUX, reason="real-time signals")
    async def test_a_signal_without_a_name(self) -> None:
        async with child(python("import os; os.kill(os.getpid(), 40)")) as it:
            assert (await it.process.wait()).describe() == "signal 40"

    async def test_a_kill_from_outside(self) -> None:
        async with child(python("print('up', flush=True); import signal; signal.pause()")) as it:
            await it.heard.line("up")
            os.kill(it.process.pid, signal.SIGKILL)
            with anyio.fail_after(WIDE):
                assert (await it.process.wait()).signal == signal.SIGKILL

    async def test_there_is_none_while_it_lives(self) -> None:
        async with child(python("print('up', flush=True); import signal; signal.pause()")) as it:
            await it.heard.line("up")
            assert it.process.exited is None

    async def test_it_can_be_awaited_any_number_of_times(self) -> None:
        async with child(python("pass")) as it:
            first = await it.process.wait()
            others = await asyncio.gather(*(it.process.wait() for _ in range(5)))
            assert all(other is first for other in others)
            assert it.process.exited is first
            assert await it.watcher is first

    async def test_a_waiter_who_is_cancelled_takes_nothing_from_the_others(self) -> None:
        async with child(python("print('up', flush=True); import signal; signal.pause()")) as it:
            await it.heard.line("up")
            impatient, patient = asyncio.create_task(it.process.wait()), asyncio.create_task(it.process.wait())
            await asyncio.sleep(0)
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            it.process.signal_group(signal.SIGKILL)
            assert (await patient).signal == signal.SIGKILL

    async def test_the_end_is_a_sign_of_activity(self) -> None:
        async with child(python("pass")) as it:
            await it.process.wait()
            assert it.process.activity.count >= 1


class TestLastWords:
    async def test_the_line_just_before_the_crash(self) -> None:
        async with child(scripted("stderr@crash=CUDA out of memory; crash=SIGKILL")) as it:
            record = await it.process.wait()
        assert (record.cause, record.last_error) == ("out_of_memory", "CUDA out of memory")
        assert record.describe() == "SIGKILL: CUDA out of memory"

    async def test_even_without_a_newline(self) -> None:
        code = "import os; os.write(2, b'loading\\nerror: half a li'); os.abort()"
        async with child(python(code)) as it:
            record = await it.process.wait()
        assert record.last_error == "error: half a li"
        assert record.last_words == ["loading", "error: half a li"]

    async def test_even_behind_a_flood(self) -> None:
        async with child(scripted(r"flood=4:lines; stderr=\nthe very last; crash=SIGKILL")) as it:
            record = await it.process.wait()
        assert record.last_words[-1] == "the very last"

    async def test_both_streams_are_read_to_their_end(self) -> None:
        code = (
            "import os; os.write(1, b'o' * 60000 + b'\\nout\\n'); os.write(2, b'e' * 60000 + b'\\nerr\\n'); os._exit(1)"
        )
        async with child(python(code)) as it:
            await it.process.wait()
        assert [line for stream, line in it.heard.lines if stream == "stdout"][-1] == "out"
        assert [line for stream, line in it.heard.lines if stream == "stderr"][-1] == "err"

    async def test_a_full_pipe_never_holds_the_child_up(self) -> None:
        code = (
            "import os; [os.write(fd, b'x' * 65536) for _ in range(160) for fd in (1, 2)]; os.write(2, b'\\ndone\\n')"
        )
        async with child(python(code)) as it:
            with anyio.fail_after(LIMIT):
                record = await it.process.wait()
        assert record.last_words[-1] == "done"

    async def test_closed_streams_are_no_death(self) -> None:
        code = """
            import os, signal
            os.write(1, b'up %d\\n' % os.getpid())
            os.close(1), os.close(2)
            signal.pause()
        """
        async with child(python(code)) as it:
            await it.heard.line("up")
            done, _ = await asyncio.wait({it.watcher}, timeout=0.1)
            assert not done
            os.kill(it.process.pid, signal.SIGTERM)
            assert (await it.process.wait()).signal == signal.SIGTERM


@pytest.mark.skipif(not LINUX, reason="finds a grandchild with a session of its own by its mark")
class TestGrandchildren:
    @pytest.mark.parametrize("where", ["", "setsid", "setsid+ignore", "orphan"])
    async def test_one_that_holds_the_pipes_does_not_hide_the_exit(self, where: str) -> None:
        fork = f"print+{where}".rstrip("+")
        async with child(scripted(f"fork={fork}; stderr=bye; exit=7")) as it:
            with anyio.fail_after(WIDE):
                record = await it.process.wait()
        assert record.code == 7
        assert record.last_words == ["bye"]

    async def test_nor_does_it_hide_a_last_line_without_newline(self) -> None:
        code = """
            import os
            if os.fork() == 0:
                os.setsid()
                os.read(os.pipe()[0], 1)
            os.write(2, b"loading\\nerror: half a li")
            os._exit(7)
        """
        async with child(python(code)) as it:
            record = await it.process.wait()
        assert (record.cause, record.last_error) == ("error", "error: half a li")

    async def test_one_that_writes_for_ever_does_not_hide_it_either(self) -> None:
        code = """
            import os
            if os.fork() == 0:
                os.setsid()
                while True:
                    os.write(2, b"still here\\n" * 1000)
            os._exit(7)
        """
        async with child(python(code)) as it:
            with anyio.fail_after(WIDE + process_module.DRAIN_LIMIT):
                assert (await it.process.wait()).code == 7

    async def test_those_of_its_group_end_with_it(self) -> None:
        async with child(scripted("fork=print+ignore; exit=7")) as it:
            await it.process.wait()
            grandchild = await it.heard.number("grandchild")
            assert await it.process.sweep() == []
        assert not alive(grandchild)


class TestWhatItGets:
    async def test_the_environment_it_is_given_and_its_mark(self) -> None:
        env = {"PATH": ENV["PATH"], "KEY": "a value with spaces; $HOME", "EMPTY": ""}
        program = shutil.which("env")
        assert program
        async with child([program], env=env, mark="mark-1") as it:
            await it.process.wait()
        assert sorted(line for _, line in it.heard.lines) == sorted(
            f"{name}={value}" for name, value in {**env, MARK: "mark-1"}.items()
        )

    async def test_its_own_mark_and_no_other(self) -> None:
        code = f"import os; print('mark', os.environ[{MARK!r}])"
        async with child(python(code), env={**ENV, MARK: "somebody else's"}, mark="mark-2") as it:
            assert await it.heard.line("mark") == "mark-2"

    async def test_nothing_on_stdin(self) -> None:
        async with child(python("import sys; print('read', repr(sys.stdin.read()))")) as it:
            assert await it.heard.line("read") == "''"

    async def test_a_session_and_a_group_of_its_own(self) -> None:
        code = "import json, os; print('ids', json.dumps([os.getpid(), os.getsid(0), os.getpgid(0)]))"
        async with child(python(code)) as it:
            assert json.loads(await it.heard.line("ids")) == [it.process.pid] * 3

    async def test_a_folder_to_work_in(self, tmp_path: Path) -> None:
        async with child(python("import os; print('cwd', os.getcwd())"), cwd=str(tmp_path)) as it:
            assert await it.heard.line("cwd") == str(tmp_path)

    @pytest.mark.skipif(not LINUX, reason="reads /proc")
    async def test_no_descriptor_of_ours_but_those_it_is_passed(self) -> None:
        """Not even an inheritable one, as C libraries and systemd leave them open."""
        code = """
            import json, os
            found = {}
            for name in os.listdir("/proc/self/fd"):
                try:
                    found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
                except OSError:
                    continue
            print("fds", json.dumps(found))
        """
        with ExitStack() as opened:
            pipes = [os.pipe() for _ in range(2)]
            for end in chain(*pipes):
                opened.callback(os.close, end)
            (inheritable, _), (passed, too) = pipes
            os.set_inheritable(inheritable, True)
            async with child(python(code), pass_fds=(passed, too)) as it:
                found = {int(fd): target for fd, target in json.loads(await it.heard.line("fds")).items()}
            assert found[passed] == found[too] != found[0]
            wanted = {found[0], found[1], found[2], found[passed]}
            assert {fd: target for fd, target in found.items() if target not in wanted} == {}
            assert os.get_inheritable(inheritable), "what is ours stays as it was"
            assert not os.get_inheritable(passed), "what is passed to one child is not passed to the next"

    async def test_arguments_as_they_are_never_through_a_shell(self, tmp_path: Path) -> None:
        words = ["$HOME", "a b", "; touch oops", "*", "`id`", "", "é\n", "--flag=x y"]
        code = "import json, sys; print('argv', json.dumps(sys.argv[1:]))"
        async with child(python(code, *words), cwd=str(tmp_path)) as it:
            assert json.loads(await it.heard.line("argv")) == words
        assert await asyncio.to_thread(lambda: list(tmp_path.iterdir())) == []
