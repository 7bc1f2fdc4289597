"""The house rules for every test: both event loops, nothing left behind, the loop never blocked, no hanging, no user files.

- An async test runs on asyncio and on uvloop; `@pytest.mark.loops("uvloop")` or `pytestmark` keeps it to the ones it names.
- After each test no child process, descriptor, thread, pending task or temporary file of it is left.
- Code of mlxsup that blocks the loop fails the test; `@pytest.mark.may_block("reason")` lets one test off, BLOCKING_ALLOWED
  one function.
- An async test that hangs is ended from inside its loop, and shows where it stood.
- TMPDIR and the XDG folders are the test run's own, and no MLXSUP_* variable of the user's is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import blockbuster
import hypothesis
import psutil
import pytest

LOOPS: Final = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
}

BLOCKING_ALLOWED: Final = {
    ("mlxsup/config/files.py", "read"): "one small file, before anything is served; from_config is no coroutine",
    ("mlxsup/runners/guard.py", "__init__"): "makes a folder for sockets, once, as the supervisor is entered",
    ("mlxsup/runners/spawning.py", "spawn_error"): "looks at one folder, after a start that failed",
    ("mlxsup/host/cgroups.py", "read_now"): "one figure of the kernel's, made in microseconds",
    ("mlxsup/runners/procfs.py", "_fields"): "one line about one process, made by the kernel in microseconds",
    ("logging/__init__.py", "handle"): "a log line goes where the program's handlers send it",
}
"""Functions that may block the loop when mlxsup calls them, with all that they call, and why."""

SETTLE: Final = 0.5
"""Seconds for what is being closed to be gone: transports close in the loop's next turn."""

_WORKERS = re.compile(r"(asyncio|uvloop)_\d+|AnyIO worker thread|asyncio-waitpid-\d+")
"""Threads that a loop keeps for later and ends with itself."""

_OURS = re.compile(r"/mlxsup/(?!testing/).*\.py$")
"""The code under test."""


# A place of our own


def pytest_configure(config: pytest.Config) -> None:
    """Point everything that a test or one of its children may write to, or read from, at a folder of this process's own."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else tests under nohup hand on that it is ignored
    root = os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it was
    folder = tempfile.mkdtemp(prefix="mst-", dir=root)  # short: sockets will be made in it
    config.stash[_FOLDER] = folder
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    for kind in ("CONFIG_HOME", "CACHE_HOME", "DATA_HOME", "STATE_HOME", "RUNTIME_DIR"):
        os.environ[f"XDG_{kind}"] = f"{folder}/xdg"
    Path(folder, "xdg").mkdir(mode=0o700)
    for name in [name for name in os.environ if name.startswith("MLXSUP_")]:
        del os.environ[name]
    hypothesis.settings.register_profile("mlxsup", deadline=None, derandomize="CI" in os.environ)
    hypothesis.settings.load_profile("mlxsup")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Clear that folder away, and point at it no more: mutmut runs pytest several times in one process."""
    tempfile.tempdir = None
    shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


_FOLDER: Final = pytest.StashKey[str]()


# Loops


@pytest.fixture(scope="module", params=list(LOOPS.values()), ids=list(LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The loop matrix: every async test runs once on each."""
    backend: tuple[str, dict[str, bool]] = request.param
    return backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep of each test the loops that its `loops` marker names."""
    items[:] = [item for item in items if _on_this_loop(item)]


def _on_this_loop(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("loops")
    callspec = getattr(item, "callspec", None)
    if marker is None or callspec is None or "anyio_backend" not in callspec.params:
        return True
    if unknown := set(marker.args) - LOOPS.keys():
        raise pytest.UsageError(f"{item.nodeid}: no such loop: {', '.join(map(str, unknown))}")
    return callspec.params["anyio_backend"] in [LOOPS[name] for name in marker.args]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """End an async test from inside its loop before its time is up, and show where it stood.

    pytest-timeout cannot: it raises in a signal handler, which uvloop takes for an error of a callback and carries on.
    """
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test) and not hasattr(test, "hypothesis"):
        marker = pyfuncitem.get_closest_marker("timeout")
        limit = float(marker.args[0] if marker and marker.args else pyfuncitem.config.getini("timeout"))
        if limit > 0:
            pyfuncitem.obj = _limited(test, 0.8 * limit)
    return (yield)


def _limited(test: Callable[..., Awaitable[None]], limit: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def limited(**arguments: object) -> None:
        where = ""
        with anyio.move_on_after(limit) as scope:
            try:
                await test(**arguments)
            except asyncio.CancelledError as error:
                where = "".join(traceback.format_exception(error))
                raise
        if scope.cancelled_caught:
            pytest.fail(f"still running after {limit:g} s\n{where}")

    return limited


# Nothing left behind


@dataclass(frozen=True)
class Belongings:
    """What this process holds, each with the words that describe it."""

    descriptors: dict[tuple[int, str], str]
    processes: dict[int, str]
    threads: dict[int, str]
    tasks: dict[int, str]
    files: dict[str, str]

    def beyond(self, other: Belongings) -> list[str]:
        """List what is here and not in the other."""
        mine, others = self.__dict__, other.__dict__
        return [text for kind, things in mine.items() for key, text in things.items() if key not in others[kind]]


def belongings(loop: asyncio.AbstractEventLoop | None, known: frozenset[int] = frozenset()) -> Belongings:
    """Look around; processes are our children, theirs, and orphans beyond the known ones with our TMPDIR in their environment."""
    threads = [one for one in threading.enumerate() if not _WORKERS.fullmatch(one.name)]
    tasks = [task for task in asyncio.all_tasks(loop) if not _is_the_test_runners(task)] if loop else []
    return Belongings(
        descriptors=_descriptors(),
        processes=_processes(known),
        threads={id(one): f"thread {one!r}" for one in threads},
        tasks={id(task): f"pending task {task!r}" for task in tasks},
        files={str(path): f"temporary file {path}" for path in Path(os.environ["TMPDIR"]).iterdir()},
    )


def _is_the_test_runners(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")


def _descriptors() -> dict[tuple[int, str], str]:
    linux = sys.platform == "linux"
    found = {}
    for path in Path("/proc/self/fd" if linux else "/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that listed the folder is closed again
            target = str(path.readlink()) if linux else repr(os.fstat(int(path.name))[1:3])
            found[int(path.name), target] = f"descriptor {path.name} -> {target}"
    return found


def _processes(known: frozenset[int]) -> dict[int, str]:
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    mark = os.environ["TMPDIR"]
    found = {}
    for pid in psutil.pids():
        if pid in known or pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if pid in children or (known and process.environ().get("TMPDIR") == mark):
                words = " ".join(process.cmdline()) or process.name()
                found[pid] = f"process {pid} ({process.status()}, parent {process.ppid()}): {words}"
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves processes, descriptors, threads, tasks or temporary files behind.

    As the first fixture of each test this is the last one to look. The loop of an async test is open and stands still both
    times: uvloop has descriptors of its own for as long as it runs.
    """
    loop = request.getfixturevalue("_loop") if "anyio_backend" in request.fixturenames else None
    before, known = belongings(loop), frozenset(psutil.pids())
    yield
    deadline = time.monotonic() + SETTLE
    while (left := belongings(loop, known).beyond(before)) and time.monotonic() < deadline:
        if loop:
            loop.run_until_complete(asyncio.sleep(0.01))
        else:
            time.sleep(0.01)
    if left:
        for pid in (int(found[1]) for text in left if (found := re.match(r"process (\d+)", text))):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        raise AssertionError("left behind by this test:\n  " + "\n  ".join(left))


@pytest.fixture
async def _loop(anyio_backend: tuple[str, dict[str, bool]]) -> asyncio.AbstractEventLoop:
    if anyio_backend == LOOPS["uvloop"]:  # which opens /dev/null with its first listener, for good
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
        server.close()
        await server.wait_closed()
    return asyncio.get_running_loop()


# The loop is never blocked


@functools.cache
def _watch() -> tuple[blockbuster.BlockBuster, list[str]]:
    """Make a watch whose functions note a blocking call and carry on: the code under test sees no odd error."""
    watch, blocked = blockbuster.BlockBuster("mlxsup"), list[str]()
    for name, function in watch.functions.items():
        allowed = dict.fromkeys(BLOCKING_ALLOWED)
        allowed |= {(file, caller): None for file, callers in function.can_block_functions for caller in callers}
        function.can_block_predicate = _noting(name, function.can_block_predicate, list(allowed), blocked)
    return watch, blocked


def _noting(
    name: str, harmless: Callable[..., bool], allowed: list[tuple[str, str]], blocked: list[str]
) -> Callable[..., bool]:
    def predicate(*arguments: Any, **named: Any) -> bool:
        if not harmless(*arguments, **named) and not _in_memory(name, *arguments):
            stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
            ours = [frame for frame in stack if _OURS.search(frame.filename)]
            if ours and not any(
                frame.filename.endswith(file) and frame.name == caller for frame in stack for file, caller in allowed
            ):
                blocked.append(f"{name}\n{''.join(traceback.format_list(ours[5::-1]))}")
        return True

    return predicate


def _in_memory(name: str, target: object = None, *_more: object) -> bool:
    """Tell what waits for no disk: /proc, and the names (not the contents) of what is in our own temporary folder."""
    where = str(target if isinstance(target, str | os.PathLike) else getattr(target, "name", ""))
    return where.startswith("/proc/") or (name.startswith("os.") and where.startswith(os.environ["TMPDIR"]))


@pytest.fixture(autouse=True)
def loop_never_blocked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which code of mlxsup blocks the event loop."""
    if "anyio_backend" not in request.fixturenames or request.node.get_closest_marker("may_block"):
        yield
        return
    watch, blocked = _watch()
    blocked.clear()
    watch.activate()
    try:
        yield
    finally:
        watch.deactivate()
    if blocked:
        pytest.fail("the event loop was blocked by " + "\n".join(blocked[:10]), pytrace=False)
