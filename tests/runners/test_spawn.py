"""A spawn that fails says why in a way that tells whether another try could help, and leaves nothing open."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import pytest

from mlxsup.errors import EngineUnavailable, LoadFailed, ResourceExhausted
from mlxsup.runners import spawning
from mlxsup.runners.output import OutputRecord
from mlxsup.runners.process import Process
from mlxsup.runners.spawning import spawn_error
from tests.waiting import until

from .children import ENV, LINUX, Child, descriptors, marked, new_mark, python, spawn

NEVER_MIND = OutputRecord(lambda stream, line, *, is_error: None)


@pytest.mark.parametrize(
    ("number", "permanent", "why"),
    [
        (errno.ENOENT, True, "no such file"),
        (errno.EACCES, True, "not executable"),
        (errno.ENOEXEC, True, "not a program for this machine"),
        (errno.ENOTDIR, True, "Not a directory"),
        (errno.EPERM, True, "Operation not permitted"),
        (errno.EIO, False, "Input/output error"),
    ],
)
def test_why_a_spawn_failed(number: int, permanent: bool, why: str) -> None:
    error = spawn_error("/opt/runner", OSError(number, os.strerror(number)))
    assert error.message.startswith("cannot start /opt/runner: ")
    assert why in error.message
    assert isinstance(error, LoadFailed)
    assert error.permanent is permanent
    assert isinstance(error, EngineUnavailable) is permanent
    assert error.details["errno"] == number
    assert error.details["stage"] == "spawn"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EMFILE, "no descriptors left (ulimit -n)"),
        (errno.ENFILE, "the system has no descriptors left"),
        (errno.EAGAIN, "no room for another process (ulimit -u)"),
        (errno.ENOMEM, "the system has no memory for it"),
    ],
)
def test_a_shortage_is_ours_and_may_pass(number: int, why: str) -> None:
    error = spawn_error("/opt/runner", OSError(number, os.strerror(number)))
    assert isinstance(error, ResourceExhausted)
    assert error.message.startswith("cannot start /opt/runner: ")
    assert why in error.message
    assert error.retry_after
    assert (error.details["errno"], error.details["stage"]) == (number, "spawn")


@pytest.mark.parametrize(("number", "name"), [(85, "EBADEXEC"), (86, "EBADARCH"), (88, "EBADMACHO")])
def test_a_program_for_another_machine_as_a_mac_says_it(
    number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers have other meanings elsewhere, which are no reason to give up."""
    error = OSError(number, "Bad CPU type in executable")
    if errno.errorcode.get(number) != name:
        elsewhere = spawn_error("/opt/runner", error)
        assert isinstance(elsewhere, LoadFailed)
        assert not elsewhere.permanent
    monkeypatch.setitem(errno.errorcode, number, name)
    found = spawn_error("/opt/runner", error)
    assert isinstance(found, EngineUnavailable)
    assert found.permanent
    assert found.message == "cannot start /opt/runner: not a program for this machine"


@pytest.mark.parametrize("most", [resource.RLIM_INFINITY, 1 << 20])
async def test_where_nothing_lists_descriptors_none_of_ours_is_inherited_either(
    most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a chroot without /dev and /proc."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(spawning, "_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "file" / "fd")))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most, most))
    with ExitStack() as opened:
        for end in (ends := os.pipe()):
            opened.callback(os.close, end)
        os.set_inheritable(ends[1], True)
        found = await asyncio.to_thread(spawning.prepare, ["true"], ENV)
        assert ends[1] in found
        assert ends[0] not in found
        code = f"import os; os.fstat({ends[1]})"
        made = await spawn(python(code))
        assert (await made.watcher).code == 1
        await made.process.sweep()


def test_an_error_without_a_number() -> None:
    error = spawn_error("x", OSError("something odd"))
    assert error.message == "cannot start x: something odd"
    assert isinstance(error, LoadFailed)
    assert not error.permanent


def _text(folder: Path) -> str:
    path = folder / "text"
    path.write_text("just a text\n")
    path.chmod(0o600)
    return str(path)


def _without_first_line(folder: Path) -> str:
    path = folder / "commands"
    path.write_text(f"echo done > {folder / 'by a shell'}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def _without_interpreter(folder: Path) -> str:
    path = folder / "script"
    path.write_text("#!/nowhere/python\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda folder: str(folder / "nothing"), errno.ENOENT),
        (lambda folder: "no-such-program-anywhere", errno.ENOENT),
        (_text, errno.EACCES),
        (str, errno.EACCES),
        (_without_first_line, errno.ENOEXEC),
        (_without_interpreter, errno.ENOENT),
        (lambda folder: _text(folder) + "/x", errno.ENOTDIR),
    ],
    ids=["not there", "not on PATH", "not executable", "a folder", "no first line", "no interpreter", "below a file"],
)
async def test_what_cannot_be_started(make: object, number: int, tmp_path: Path) -> None:
    assert callable(make)
    before = descriptors()
    program = make(tmp_path)
    with pytest.raises(EngineUnavailable) as caught:
        await spawn([program])
    assert caught.value.details["errno"] == number
    assert program in caught.value.message
    assert caught.value.permanent
    assert descriptors() == before
    assert not (tmp_path / "by a shell").exists()


async def test_what_is_no_program_fails_one_way_or_another(tmp_path: Path) -> None:
    """The C library may hand it to a shell, which can do nothing with it either."""
    path = tmp_path / "noise"
    path.write_bytes(bytes(range(256)))
    path.chmod(0o700)
    try:
        it = await spawn([str(path)])
    except EngineUnavailable as error:
        number = error.details["errno"]
    else:
        number = errno.ENOEXEC if (await it.watcher).code != 0 else None
    assert number == errno.ENOEXEC


async def test_a_folder_to_work_in_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Or the program itself would be looked for, in vain."""
    missing = str(tmp_path / "missing")
    with pytest.raises(LoadFailed) as caught:
        await spawn(python("pass"), cwd=missing)
    assert missing in caught.value.message


@pytest.mark.parametrize("argv", [["/bin/echo", "a\0b"], ["/bin/ec\0ho"]], ids=["argument", "program"])
async def test_what_no_argument_list_can_hold(argv: list[str]) -> None:
    before = descriptors()
    with pytest.raises((LoadFailed, ValueError)):
        await spawn(argv)
    assert descriptors() == before


SIGNALS = """
    import signal
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    print("ignored", sorted(set(ignored) - {signal.SIGPIPE, signal.SIGXFSZ}), flush=True)
    print("blocked", sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), flush=True)
"""


async def test_signals_that_the_host_ignores_or_blocks_reach_it() -> None:
    """Python itself ignores two, in the child that is asked as well."""
    wanted = signal.SIGINT, signal.SIGHUP
    before = [signal.signal(number, signal.SIG_IGN) for number in wanted]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        it = await spawn(python(SIGNALS))
        assert (await it.watcher).code == 0
        assert [signal.getsignal(number) for number in wanted] == [signal.SIG_IGN] * 2
        assert {signal.SIGTERM, signal.SIGUSR1} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
    assert await it.heard.line("ignored") == "[]"
    assert await it.heard.line("blocked") == "[]"


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Have room for so many descriptors and not one more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(text.split()[0]) for text in descriptors()) + 64
    with ExitStack() as held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        fillers: list[int] = []
        try:
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for filler in fillers[:count]:
            os.close(filler)
        try:
            yield
        finally:
            for filler in fillers[count:]:
                os.close(filler)


@pytest.mark.skipif(not LINUX, reason="looks at /proc")
@pytest.mark.parametrize("room", range(14))
async def test_few_descriptors_are_a_passing_failure_that_leaves_nothing(room: int) -> None:
    mark = new_mark()
    before = descriptors()
    argv = python("import signal; signal.pause()")
    with free_descriptors(room):
        (found,) = await asyncio.gather(spawn(argv, mark=mark), return_exceptions=True)
    if isinstance(found, ResourceExhausted):
        assert found.details["errno"] == errno.EMFILE
        assert "descriptors" in found.message
    else:
        assert isinstance(found, Child)
        found.process.signal_group(signal.SIGKILL)
        await found.watcher
    await until(lambda: not marked(mark), 5)
    await until(lambda: descriptors() == before, 5)


@pytest.mark.skipif(not LINUX, reason="finds processes by their mark")
@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_spawn_that_is_cancelled_leaves_nothing(turns: int, how: str) -> None:
    """Wherever the cancellation meets it, and also where it is said again and again, as a cancelled scope of anyio does."""
    mark = new_mark()
    before = descriptors()
    scope = anyio.CancelScope()

    async def start() -> None:
        argv = python("import signal; signal.pause()")
        with scope:
            process = await Process.spawn(argv, env=ENV, cwd=None, mark=mark, output=NEVER_MIND)
            process.signal_group(signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.watch()

    starting = asyncio.create_task(start())
    for _ in range(turns):
        await asyncio.sleep(0)
    if how == "task":
        starting.cancel()
    else:
        scope.cancel()
    await asyncio.wait({starting})
    await until(lambda: not marked(mark), 5)
    await until(lambda: descriptors() == before, 5)
