"""No descriptors left: nobody is ended for it and nobody else is blamed, and when there are some again all goes on."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import MlxsupError, Supervisor, registry, weights
from mlxsup.errors import ResourceExhausted
from mlxsup.runners import marks, procfs
from mlxsup.runners import process as process_module
from mlxsup.runners import runner as runner_module
from mlxsup.runners.footprint import Observer
from mlxsup.statefiles import state_directory
from mlxsup.testing import EventRecorder, Gate, fake_runner
from mlxsup.threads import in_thread
from tests.faults.house import Record, alive, collect, kill, report, state_is, supervisor, words
from tests.waiting import LIMIT, until

pytestmark = pytest.mark.anyio

QUICK: dict[str, Any] = {"probe_interval": "0.05s", "probe_timeout": "5s"}
LINUX = sys.platform == "linux"


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this program open nothing; what is open stays so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def gone(pid: int) -> bool:
    """Whether a child was reaped; asked without a descriptor."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def failure(sup: Supervisor, model: str = "m") -> MlxsupError:
    with anyio.fail_after(LIMIT), pytest.raises(MlxsupError) as caught:
        await collect(sup, model)
    return caught.value


def assert_ours(error: MlxsupError) -> None:
    assert isinstance(error, ResourceExhausted)
    assert (error.source, error.status, error.details["errno"]) == ("mlxsup", 503, 24)
    assert "descriptors left (ulimit -n)" in error.message
    assert error.retry_after


async def test_those_that_live_are_left_alone() -> None:
    async with Gate() as gate, supervisor(m=fake_runner(f"gate@2={gate.path}") | QUICK, n=fake_runner() | QUICK) as sup:
        await sup.load("n")
        work = asyncio.create_task(collect(sup))
        arrival = await gate.arrival("2")
        pids = [report(sup, name).pid for name in ("m", "n")]
        with no_descriptors():
            await anyio.sleep(1.0)  # twenty probes that cannot be made
            assert [report(sup, name).state for name in ("m", "n")] == ["ready", "ready"]
            arrival.go()
            assert words(await work) == "t1 t2 t3 "
            await anyio.sleep(0.5)
        assert words(await collect(sup, "n")) == "t1 t2 t3 "
        assert [report(sup, name).pid for name in ("m", "n")] == pids


async def test_a_request_is_refused_and_its_runner_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "BLAME_WAIT", 10 * LIMIT)  # nobody waits for a death that would explain it
    async with supervisor(m=fake_runner()) as sup:
        await sup.load("m")
        pid = report(sup).pid
        with no_descriptors():
            assert_ours(await failure(sup))
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert report(sup).pid == pid


@pytest.mark.parametrize("address", ["unix", "tcp"])
@pytest.mark.parametrize("announce", [False, True])
async def test_a_load_that_cannot_begin(address: Any, announce: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with supervisor(n=fake_runner(), m=fake_runner(address=address, announce=announce)) as sup:
        await sup.load("n")  # what is needed once is there
        with no_descriptors():
            assert_ours(await failure(sup))
        assert "unexpected failure" not in caplog.text
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_the_first_load_of_all(caplog: pytest.LogCaptureFixture) -> None:
    """There is no sentinel yet."""
    async with supervisor(m=fake_runner()) as sup:
        with no_descriptors():
            assert_ours(await failure(sup))
        assert "unexpected failure" not in caplog.text
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_one_dies_and_what_it_left_is_looked_for_until_that_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "KILL_WAIT", 0.2)
    record = Record(tmp_path)
    scenario = f"fork@start=setsid+ignore; record={record.path}"
    async with supervisor(m=fake_runner(scenario), n=fake_runner()) as sup, EventRecorder(sup) as recorder:
        await sup.load("m")
        await sup.load("n")
        pid, (grandchild,) = report(sup).pid, record.pids("fork")
        with no_descriptors():
            kill(pid)
            await state_is(sup, "stopping")
            await anyio.sleep(1.0)  # some looks in vain
            assert not gone(grandchild) or not LINUX
            assert report(sup).state == "stopping"
            assert report(sup, "n").state == "ready"
            assert "stuck" not in [event.state for event in recorder.events]
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert "stuck" not in [event.state for event in recorder.events]
        assert not alive(grandchild) or not LINUX
        assert report(sup, "n").state == "ready"


async def test_an_unload_ends_when_it_can_be_seen_that_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "KILL_WAIT", 0.2)
    async with supervisor(m=fake_runner(), n=fake_runner()) as sup:
        await sup.load("m")
        await sup.load("n")
        pid = report(sup).pid
        with no_descriptors():
            unloading = asyncio.create_task(sup.unload("m"))
            await until(lambda: gone(pid))
            await anyio.sleep(1.0)
            assert not unloading.done() or not LINUX
            assert report(sup, "n").state == "ready"
        with anyio.fail_after(LIMIT):
            await unloading
        assert report(sup).state == "stopped"
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_a_supervisor_can_be_left_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "KILL_WAIT", 0.2)
    sup = supervisor(m=fake_runner())
    await sup.__aenter__()
    await sup.load("m")
    pid = report(sup).pid
    with no_descriptors():
        leaving = asyncio.create_task(sup.__aexit__(None, None, None))
        await until(lambda: gone(pid))
    with anyio.fail_after(LIMIT):
        await leaving


async def test_files_of_a_model_are_not_taken_for_broken(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with no_descriptors():
        error = await in_thread(_unreadable, path)
    assert_ours(error)
    assert str(path) in error.message


def _unreadable(path: Path) -> MlxsupError:
    with pytest.raises(MlxsupError) as caught:
        weights.measure(path)
    return caught.value


@pytest.mark.skipif(not LINUX, reason="looks at /proc")
@pytest.mark.parametrize(
    "look",
    [
        lambda: procfs.environment(os.getpid()),
        lambda: procfs.group(os.getpid()),
        lambda: procfs.is_running(os.getpid()),
        lambda: procfs.holds_socket(os.getpid(), ["1"]),
        lambda: marks.marked("none"),
    ],
    ids=["mark", "group", "state", "sockets", "all"],
)
def test_a_look_that_failed_proves_nothing(look: Callable[[], object]) -> None:
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        look()


async def test_no_threads_left_end_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a limit on tasks counts those of the runners."""
    monkeypatch.setattr(registry, "RECORD_AGAIN", 0.05)
    async with supervisor(m=fake_runner()) as sup:
        await sup.load("m")
        pid, tried = report(sup).pid, 0

        def start(_: threading.Thread) -> None:
            nonlocal tried
            tried += 1
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            sup._registry()._groups_changed.set()
            sup._registry()._machine._surveyed = None
            await until(lambda: tried > 3)
            await sup._registry()._look(thorough=True)
            assert (report(sup).state, report(sup).pid) == ("ready", pid)
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert report(sup).pid == pid
        assert alive(pid)
    assert gone(pid)


@pytest.mark.may_block("there is no thread to do it in")
async def test_no_threads_left_end_no_load_and_are_no_fault_of_one_that_cannot_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = 0

    def start(_: threading.Thread) -> None:
        nonlocal tried
        tried += 1
        raise RuntimeError("can't start new thread")

    async with Gate() as gate, supervisor(m=fake_runner(f"gate@loading={gate.path}"), n=fake_runner()) as sup:
        load = asyncio.create_task(sup.load("m"))
        arrival = await gate.arrival()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(ResourceExhausted, match="can't start new thread"):
                await sup.load("n")
            before = tried
            await until(lambda: tried > before + 1)
            assert report(sup).state == "starting"
            arrival.go()
            await load
        await sup.load("n")


@pytest.mark.may_block("there is no thread to do it in")
async def test_no_threads_left_keep_nothing_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        async with supervisor(m=fake_runner(), n=fake_runner()) as sup:
            await sup.load("m")
            await sup.load("n")
            pid, other = report(sup).pid, report(sup, "n").pid
            home, sockets = state_directory() / sup._registry()._guard.mark, sup._registry()._guard.folder
            assert home.is_dir()
            patch.setattr(threading.Thread, "start", start)
            await sup.unload("m")
            assert gone(pid)
            assert report(sup).state == "stopped"
        assert gone(other)
        assert not home.exists()
        assert not sockets.exists()


async def test_a_fault_of_ours_in_a_look_at_memory_ends_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(*_: Any) -> Any:
        raise ValueError("this was not foreseen")

    async with supervisor(m=fake_runner()) as sup:
        await sup.load("m")
        pid = report(sup).pid
        with monkeypatch.context() as patch:
            patch.setattr(Observer, "look", look)
            await sup._registry()._look(thorough=True)
        (said,) = [record for record in caplog.records if "could not look" in record.message]
        assert "this was not foreseen" in said.message
        assert said.exc_info
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert report(sup).pid == pid
