"""Log lines get out at once where they can, wait for a slow reader without holding anybody up, and are counted when lost."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxsup.daemon import lines as lines_module
from mlxsup.daemon.lines import LineHandler

LIMIT = 10.0
WIDE = "x" * 1000


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def log(handler: LineHandler, *texts: str) -> None:
    for text in texts:
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))


def read(reader: int, count: int) -> list[str]:
    """Read so many lines."""
    text = b""
    while text.count(b"\n") < count:
        text += os.read(reader, 65536)
    assert text.endswith(b"\n")
    return text.decode().splitlines()


def writers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "mlxsup log"]


def until_caught_up() -> None:
    deadline = time.monotonic() + LIMIT
    while writers():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_line_is_out_before_the_call_returns(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(reader, False)
    handler = LineHandler(writer)
    for text in ("one", "zwölf", "\udc80 half", WIDE * 9):
        log(handler, text)
        assert os.read(reader, 65536) == text.encode("utf-8", "backslashreplace") + b"\n"
    assert not writers()


def test_a_reader_that_sleeps_holds_nobody_up_and_gets_all_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = LineHandler(writer)
    sent = [f"{number} {WIDE}" for number in range(1000)]
    began = time.monotonic()
    log(handler, *sent)
    assert time.monotonic() - began < LIMIT / 2
    assert len(writers()) == 1
    assert read(reader, 1000) == sent
    until_caught_up()
    log(handler, "after")
    assert read(reader, 1) == ["after"]


def test_what_is_too_much_to_hold_is_counted_where_it_is_missing(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    monkeypatch.setattr(lines_module, "_MAX_HELD", 100 * len(WIDE))
    handler = LineHandler(writer)
    sent = [f"{number} {WIDE}" for number in range(1000)]
    log(handler, *sent)
    first = os.read(reader, 40 * len(WIDE))  # from here on there is room again
    deadline = time.monotonic() + LIMIT
    while handler._size > 90 * len(WIDE):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    log(handler, "last")
    got = first
    while not got.endswith(b"last\n"):
        got += os.read(reader, 65536)
    until_caught_up()
    *kept, told, last = got.decode().splitlines()
    assert last == "last"
    assert kept == sent[: len(kept)]
    assert told == f"{1000 - len(kept)} lines of log were lost: they could not be written in time"


def test_the_end_of_the_program_waits_for_a_slow_reader(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = LineHandler(writer)
    log(handler, *(f"{number} {WIDE}" for number in range(500)))
    got: list[str] = []
    slow = threading.Timer(0.2, lambda: got.extend(read(reader, 500)))
    slow.start()
    handler.flush()
    assert not handler._held
    slow.join()
    assert len(got) == 500


def test_the_end_of_the_program_does_not_wait_for_ever(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pipe
    monkeypatch.setattr(lines_module, "_FLUSH_LIMIT", 0.1)
    handler = LineHandler(writer)
    log(handler, *(f"{number} {WIDE}" for number in range(500)))
    began = time.monotonic()
    handler.flush()
    assert time.monotonic() - began < LIMIT / 2
    read(reader, 500)
    until_caught_up()


def test_a_pipe_that_another_program_has_made_non_blocking_is_waited_for_too(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    handler = LineHandler(writer)
    sent = [f"{number} {WIDE}" for number in range(500)]
    log(handler, *sent)
    assert read(reader, 500) == sent
    until_caught_up()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_loses_lines_and_raises_nothing() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        handler = LineHandler(full.fileno())
        log(handler, "one", "two")
        handler.flush()
    assert not handler._held
    assert handler._size == 0


def test_a_reader_that_has_gone_raises_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    handler = LineHandler(writer)
    log(handler, "one", "two")
    os.close(writer)
    assert not writers()
