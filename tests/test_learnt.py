"""What is learnt of models is kept in one file that survives whatever happens to it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlxsup.learnt import LEARNT_FILE, LOCK_FILE, LOCK_WAIT, MOST_LESSONS, Learnt, Lesson


def opened(folder: Path) -> Learnt:
    learnt = Learnt(folder)
    learnt.open()
    return learnt


def add(learnt: Learnt, key: str, lesson: Lesson) -> None:
    learnt.keep(key, lesson)
    learnt.write()


def test_the_next_life_knows_what_this_one_learnt(tmp_path: Path) -> None:
    add(opened(tmp_path / "new"), "m:1", Lesson(memory=5, seconds=2.5, at=1.0))
    assert opened(tmp_path / "new").get("m:1") == Lesson(memory=5, seconds=2.5, at=1.0)
    assert opened(tmp_path / "new").get("m:2") is None


def test_the_most_memory_and_the_latest_time_are_kept(tmp_path: Path) -> None:
    learnt = opened(tmp_path)
    add(learnt, "m", Lesson(memory=5, at=1.0))
    add(learnt, "m", Lesson(seconds=3.0, at=2.0))
    add(learnt, "m", Lesson(memory=4, at=3.0))
    assert learnt.get("m") == Lesson(memory=5, seconds=3.0, at=3.0)


def test_a_lesson_counts_before_it_is_written(tmp_path: Path) -> None:
    learnt = opened(tmp_path)
    learnt.keep("m", Lesson(memory=5, at=1.0))
    assert learnt.get("m") == Lesson(memory=5, at=1.0)
    assert not learnt.path.exists()
    learnt.write()
    written = learnt.path.stat().st_mtime_ns
    learnt.write()  # nothing new
    assert learnt.path.stat().st_mtime_ns == written
    assert opened(tmp_path).get("m")


def test_two_supervisors_keep_each_others_lessons(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    add(one, "a", Lesson(memory=1, at=1.0))
    add(other, "b", Lesson(memory=2, at=2.0))
    assert opened(tmp_path).get("a")
    assert opened(tmp_path).get("b")


def test_two_supervisors_that_learn_of_the_same_model_know_what_both_know(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    add(one, "m", Lesson(memory=9, seconds=1.0, at=1.0))
    add(other, "m", Lesson(memory=5, seconds=2.0, at=2.0))
    assert opened(tmp_path).get("m") == other.get("m") == Lesson(memory=9, seconds=2.0, at=2.0)
    add(one, "m", Lesson(memory=7, at=3.0))
    assert one.get("m") == Lesson(memory=9, seconds=2.0, at=3.0)


def test_many_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    supervisors = [opened(tmp_path) for _ in range(4)]

    def learn(number: int) -> None:
        for turn in range(20):
            add(supervisors[number], f"{number}.{turn}", Lesson(memory=1, at=1.0))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(learn, range(4)))
    assert len(opened(tmp_path)._lessons) == 80


def test_one_that_was_stopped_while_it_wrote_is_not_waited_for(tmp_path: Path) -> None:
    holder = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        began = time.monotonic()
        add(opened(tmp_path), "m", Lesson(memory=1, at=1.0))
        assert LOCK_WAIT <= time.monotonic() - began < 10 * LOCK_WAIT
    finally:
        os.close(holder)
    assert opened(tmp_path).get("m")


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP])
def test_where_files_cannot_be_locked_nobody_waits(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    waited: list[float] = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", waited.append)
    add(opened(tmp_path), "m", Lesson(memory=1, at=1.0))
    assert waited == []
    assert caplog.text == ""
    assert opened(tmp_path).get("m")


def test_the_lock_is_one_that_a_file_server_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS makes record locks of these, and wants a descriptor that may write for one that is exclusive."""
    really, modes = fcntl.flock, list[int]()

    def flock(handle: int, operation: int) -> None:
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        really(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    add(opened(tmp_path), "m", Lesson(memory=1, at=1.0))
    assert modes == [os.O_RDWR]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEARNT_FILE, LOCK_FILE]
    assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b'{"models":', b"[]", b'{"models":{"m":{"memory":"x"}}}'])
def test_rubbish_is_a_warning_and_replaced(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LEARNT_FILE).write_bytes(content)
    learnt = opened(tmp_path)
    assert "learnt anew" in caplog.text
    add(learnt, "m", Lesson(memory=1, at=1.0))
    assert opened(tmp_path).get("m")


@pytest.mark.parametrize("models", [b'{"m":{"memory":1}}', b'[["m", 1]]'])
def test_another_version_is_left_out_and_set_aside(
    tmp_path: Path, models: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    content = b'{"version":99,"models":' + models + b"}"
    (tmp_path / LEARNT_FILE).write_bytes(content)
    learnt = opened(tmp_path)
    assert learnt.get("m") is None
    assert "is of version 99, and only 1 is known here" in caplog.text
    learnt.keep("n", Lesson(memory=1, at=1.0))
    learnt.write()
    assert (tmp_path / f"{LEARNT_FILE}.version-99").read_bytes() == content
    assert "it is kept as" in caplog.text
    caplog.clear()
    assert opened(tmp_path).get("n")
    assert not caplog.text


def test_a_disk_that_refuses_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    learnt = Learnt(tmp_path / "file")
    add(learnt, "n", Lesson(memory=1, at=1.0))
    add(learnt, "m", Lesson(memory=1, at=1.0))
    assert caplog.text.count("not kept") == 1
    (tmp_path / "file").unlink()
    learnt.write()
    assert {opened(tmp_path / "file").get(name) for name in "mn"} == {Lesson(memory=1, at=1.0)}


def test_a_lock_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    learnt = Learnt(tmp_path)
    add(learnt, "m", Lesson(memory=1, at=1.0))
    assert caplog.text.count("not kept") == 1
    (tmp_path / LOCK_FILE).rmdir()
    learnt.write()
    assert opened(tmp_path).get("m")


def test_it_does_not_grow_for_ever(tmp_path: Path) -> None:
    learnt = opened(tmp_path)
    learnt._lessons = {f"m{number}": Lesson(at=float(number)) for number in range(MOST_LESSONS + 5)}
    add(learnt, "new", Lesson(at=1e9))
    fresh = opened(tmp_path)
    assert fresh.get("new")
    assert fresh.get("m0") is None
