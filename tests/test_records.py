"""What an earlier life left behind is found and ended, and nothing else is."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import msgspec
import psutil
import pytest

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.learnt import LEARNT_FILE, LOCK_FILE
from mlxsup.records import LOCKLESS_AGE, Group, Record, Records, sweep
from mlxsup.runners import marks, procfs
from mlxsup.runners.socketfolder import FOLDER_PREFIX
from mlxsup.statefiles import state_directory
from mlxsup.testing import fake_runner

pytestmark = pytest.mark.anyio
MARK = secrets.token_hex(8)


@pytest.fixture
def leftover() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, as a runner is, without our mark."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"], start_new_session=True
    )
    yield child
    child.kill()
    child.wait()


def abandoned(directory: Path, *groups: Group, mark: str = MARK, folder: str = "") -> Path:
    """The folder of a supervisor that is gone: its lock is free."""
    records = Records(directory, mark, folder)
    records.open()
    records.write(list(groups))
    assert records._lock is not None
    os.close(records._lock)
    return directory / mark


def test_a_recorded_runner_is_ended_and_the_folder_removed(tmp_path: Path, leftover: subprocess.Popen[bytes]) -> None:
    sockets = tmp_path / f"{FOLDER_PREFIX}sockets"
    sockets.mkdir()
    (sockets / "1.sock").touch()
    home = abandoned(tmp_path / "state", Group(leftover.pid, procfs.start_time(leftover.pid)), folder=str(sockets))
    assert sweep(tmp_path / "state") == [leftover.pid]
    assert leftover.wait(5) == -signal.SIGKILL
    assert not home.exists()
    assert not sockets.exists()


def test_one_with_the_mark_is_ended_though_it_left_its_group(tmp_path: Path) -> None:
    env = {**os.environ, "MLXSUP_RUNNER": f"{MARK}.aa"}
    program = [sys.executable, "-I", "-S", "-c", "import signal; print(flush=True); signal.pause()"]
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        abandoned(tmp_path)
        assert sweep(tmp_path) == [child.pid]
        assert child.wait(5) == -signal.SIGKILL


def test_a_recycled_pid_is_left_alone(tmp_path: Path, leftover: subprocess.Popen[bytes]) -> None:
    home = abandoned(tmp_path, Group(leftover.pid, "1"))
    assert sweep(tmp_path) == []
    assert leftover.poll() is None
    assert not home.exists()


def test_pids_of_another_boot_mean_nothing(tmp_path: Path, leftover: subprocess.Popen[bytes]) -> None:
    home = abandoned(tmp_path)
    groups = [Group(leftover.pid, procfs.start_time(leftover.pid))]
    (home / "record.json").write_bytes(msgspec.json.encode(Record(mark=MARK, boot="another", groups=groups)))
    assert sweep(tmp_path) == []
    assert leftover.poll() is None


def test_a_folder_in_use_is_left_alone(tmp_path: Path, leftover: subprocess.Popen[bytes]) -> None:
    records = Records(tmp_path, MARK, "")
    records.open()
    records.write([Group(leftover.pid, procfs.start_time(leftover.pid))])
    assert sweep(tmp_path) == []
    assert leftover.poll() is None
    assert (tmp_path / MARK / "record.json").exists()
    records.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]", b'{"version":1}', b"[" * 100_000])
def test_a_record_that_cannot_be_read_is_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    home = abandoned(tmp_path)
    (home / "record.json").write_bytes(content)
    assert sweep(tmp_path) == []
    assert "cannot be read" in caplog.text
    assert not home.exists()


def test_only_folders_of_ours_are_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    abandoned(tmp_path / "state", folder=str(precious))
    sweep(tmp_path / "state")
    assert precious.exists()


@pytest.mark.parametrize("name", ["photos", "0123456789abcdeg", "0123456789abcdef0", "0123456789abcdef"])
def test_what_others_keep_beside_it_is_left_alone_though_it_has_a_lock(tmp_path: Path, name: str) -> None:
    """A program that uses the library keeps its own folders there, and locks in them too."""
    (tmp_path / name / "2026").mkdir(parents=True)
    for file in ("lock", "record.json", "2026/summer.jpg"):
        (tmp_path / name / file).write_text("{}")
    assert sweep(tmp_path) == []
    assert [(tmp_path / name / file).exists() for file in ("lock", "record.json", "2026/summer.jpg")] == [True] * 3


def test_a_link_to_a_folder_elsewhere_is_not_followed(tmp_path: Path) -> None:
    elsewhere = abandoned(tmp_path / "elsewhere")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / MARK).symlink_to(elsewhere)
    assert sweep(tmp_path / "state") == []
    assert (elsewhere / "record.json").exists()


def test_only_sockets_are_removed_from_the_folder_of_sockets(tmp_path: Path) -> None:
    """Its name may be somebody else's by now."""
    sockets = tmp_path / f"{FOLDER_PREFIX}models"
    sockets.mkdir()
    (sockets / "1.sock").touch()
    (sockets / "weights.safetensors").touch()
    home = abandoned(tmp_path / "state", folder=str(sockets))
    sweep(tmp_path / "state")
    assert not home.exists()
    assert [path.name for path in sockets.iterdir()] == ["weights.safetensors"]


def test_what_somebody_put_into_the_folder_in_use_outlives_it(tmp_path: Path) -> None:
    records = Records(tmp_path, MARK, "")
    records.open()
    (tmp_path / MARK / "thesis.txt").touch()
    records.close()
    assert [path.name for path in (tmp_path / MARK).iterdir()] == ["thesis.txt"]


def test_a_folder_of_sockets_that_moved_is_noted_for_good(tmp_path: Path) -> None:
    records = Records(tmp_path, MARK, "/old")
    records.open()
    for groups, folder in (([], "/new"), ([Group(1, "2")], None)):
        records.write(groups, folder)
        assert msgspec.json.decode((tmp_path / MARK / "record.json").read_bytes(), type=Record).folder == "/new"
    records.close()


def test_a_state_directory_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    records = Records(tmp_path / "file" / "below", MARK, "")
    records.open()
    records.write([])
    records.close()
    assert caplog.text.count("no record of runners is kept") == 1
    assert sweep(tmp_path / "file" / "below") == []


FULL = """
import json, logging, resource, sys
from pathlib import Path
from mlxsup.records import Group, Records

logging.basicConfig(level=logging.INFO, format="%(message)s")
records = Records(Path(sys.argv[1]), "0123456789abcdef", "")
record = Path(sys.argv[1]) / "0123456789abcdef" / "record.json"
free = resource.getrlimit(resource.RLIMIT_FSIZE)
results = [records.open()]
for size in (free[0], 0, 10, 200, free[0]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, free[1]))
    results.append(records.write([Group(number, "x" * 40) for number in range(len(results) * 10)]))
    results.append(len(json.loads(record.read_text())["groups"]))
    results.append(sorted(path.name for path in record.parent.iterdir()))
records.close()
print(json.dumps(results))
"""
"""A disk takes all, nothing, a little and again all; signal SIGXFSZ is ignored by Python itself."""


def test_a_disk_that_is_full_leaves_the_last_whole_record_and_is_told_of_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=20, check=True
    )
    left = ["lock", "record.json"]
    assert json.loads(done.stdout) == [
        True,
        *(True, 10, left),
        *(False, 10, left),
        *(False, 10, left),
        *(False, 10, left),
        *(True, 130, left),
    ]
    first, second = done.stderr.splitlines()
    assert first.startswith("no record of runners is kept, for now: ")
    assert second == "the record of runners is kept again"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_start_is_tried_again(tmp_path: Path) -> None:
    """The folder cannot even be made: here because something is in its way."""
    (tmp_path / "state").touch()
    records = Records(tmp_path / "state", MARK, "")
    assert not records.open()
    assert not records.write([])
    (tmp_path / "state").unlink()
    assert records.write([Group(1, "2")])
    assert b'"pgid":1' in (tmp_path / "state" / MARK / "record.json").read_bytes()
    records.close()
    assert records.write([Group(1, "2")])
    assert list((tmp_path / "state").iterdir()) == []


def test_a_folder_that_somebody_removed_is_made_anew(tmp_path: Path) -> None:
    records = Records(tmp_path, MARK, "")
    records.open()
    shutil.rmtree(tmp_path / MARK)
    assert not records.write([Group(1, "2")])
    assert records.write([Group(1, "2")])
    assert sweep(tmp_path) == []
    assert (tmp_path / MARK / "record.json").exists()
    records.close()


def test_where_state_is_kept() -> None:
    assert state_directory({"STATE_DIRECTORY": "/var/lib/mlxsup:/x", "XDG_STATE_HOME": "/s"}) == Path("/var/lib/mlxsup")
    assert state_directory({"STATE_DIRECTORY": "/var/lib/myapp"}) == Path("/var/lib/myapp/mlxsup")
    assert state_directory({"XDG_STATE_HOME": "/s"}) == Path("/s/mlxsup")
    assert state_directory({"STATE_DIRECTORY": "r", "XDG_STATE_HOME": "r", "HOME": "/h"}) == Path(
        "/h/.local/state/mlxsup"
    )
    assert state_directory({"XDG_STATE_HOME": "/s", "STATE_DIRECTORY": ""}) == Path("/s/mlxsup")
    assert state_directory({"HOME": "/home/jane"}) == Path("/home/jane/.local/state/mlxsup")


async def test_a_supervisor_ends_what_another_left_and_leaves_nothing_itself(leftover: subprocess.Popen[bytes]) -> None:
    group = Group(leftover.pid, procfs.start_time(leftover.pid))
    await anyio.to_thread.run_sync(abandoned, state_directory(), group)
    async with Supervisor(parse({"models": {"m": fake_runner()}}, KEYS)) as sup:
        assert not psutil.pid_exists(leftover.pid) or psutil.Process(leftover.pid).status() == psutil.STATUS_ZOMBIE
        await sup.load("m")
        (record,) = state_directory().glob("*/record.json")
        await _written(record, sup.report("m").pid)
    assert {path.name for path in state_directory().iterdir()} <= {LEARNT_FILE, LOCK_FILE}


async def _written(record: Path, pid: int) -> None:
    with anyio.fail_after(5):
        while True:
            groups = msgspec.json.decode(await anyio.to_thread.run_sync(record.read_bytes), type=Record).groups
            if pid in [group.pgid for group in groups]:
                return
            await anyio.sleep(0.01)


def lockless(directory: Path, *, age: float = 2 * LOCKLESS_AGE, name: str = MARK) -> Path:
    """A folder of ours whose lock file somebody has removed, that long ago."""
    home = abandoned(directory, mark=name)
    (home / "lock").unlink()
    then = time.time() - age
    os.utime(home, (then, then))
    return home


@contextmanager
def served_by(supervisor: int) -> Iterator[subprocess.Popen[bytes]]:
    """A runner with our mark, and the pid of who started it in its environment."""
    env = {"PATH": os.environ["PATH"], marks.MARK: f"{MARK}.1", marks.SUPERVISOR_PID: str(supervisor)}
    argv = [sys.executable, "-I", "-S", "-c", "import os, signal; os.write(1, b'up'); signal.pause()"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, start_new_session=True) as runner:
        try:
            assert runner.stdout is not None
            assert runner.stdout.read(2) == b"up"
            yield runner
        finally:
            runner.kill()


def test_a_folder_without_its_lock_is_swept_when_it_is_old(tmp_path: Path) -> None:
    home = lockless(tmp_path)
    assert sweep(tmp_path) == []
    assert not home.exists()


@pytest.mark.skipif(not procfs.AVAILABLE, reason="finds it by its mark")
def test_what_it_left_is_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as supervisor:
        pass
    home = lockless(tmp_path)
    with served_by(supervisor.pid) as runner:
        assert sweep(tmp_path) == [runner.pid]
        assert runner.wait(5) == -signal.SIGKILL
    assert not home.exists()


def test_a_supervisor_that_lives_may_have_lost_its_lock(tmp_path: Path) -> None:
    home = lockless(tmp_path)
    with served_by(os.getpid()) as runner:
        assert sweep(tmp_path) == []
        assert runner.poll() is None
    assert home.exists()


def test_a_young_one_is_being_made(tmp_path: Path) -> None:
    home = lockless(tmp_path, age=LOCKLESS_AGE / 2)
    assert sweep(tmp_path) == []
    assert home.exists()


@pytest.mark.parametrize("name", ["documents", "0123456789abcdeg", "0123456789abcdef0"])
def test_a_folder_of_another_name_is_not_ours(tmp_path: Path, name: str) -> None:
    home = lockless(tmp_path, name=name)
    assert sweep(tmp_path) == []
    assert home.exists()


def test_a_folder_with_something_else_in_it_is_not_ours(tmp_path: Path) -> None:
    home = lockless(tmp_path)
    (home / "thesis.txt").touch()
    os.utime(home, (0, 0))
    assert sweep(tmp_path) == []
    assert home.exists()
