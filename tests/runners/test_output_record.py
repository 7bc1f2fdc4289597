"""What is kept, told and logged of a child's two streams."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.runners.output import FIRST_LINES, LAST_LINES, OutputRecord, Stream

from .chunking import cut

MIB = 1 << 20


class Told:
    """Gets the lines for the log; time stands still unless it is moved."""

    def __init__(self) -> None:
        self.lines: list[tuple[Stream, str]] = []
        self.errors: list[str] = []
        self.now = 100.0

    def __call__(self, stream: Stream, line: str, *, is_error: bool) -> None:
        self.lines.append((stream, line))
        if is_error:
            self.errors.append(line)

    def record(self, noise: str | None = None) -> OutputRecord:
        return OutputRecord(self, re.compile(noise) if noise else None, clock=lambda: self.now)


def test_each_line_is_told_with_its_stream_and_whether_it_is_an_error() -> None:
    told = Told()
    record = told.record()
    record.feed("stdout", b"hello\n")
    record.feed("stderr", b"error: no\nbye\n")
    assert told.lines == [("stdout", "hello"), ("stderr", "error: no"), ("stderr", "bye")]
    assert told.errors == ["error: no"]


def test_streams_are_cut_into_lines_apart_from_each_other() -> None:
    told = Told()
    record = told.record()
    record.feed("stdout", b"on")
    record.feed("stderr", b"two\n")
    record.feed("stdout", b"e\n")
    assert told.lines == [("stderr", "two"), ("stdout", "one")]


@given(st.binary(max_size=300), st.data())
def test_nothing_depends_on_how_the_output_is_cut(output: bytes, data: st.DataObject) -> None:
    def kept(chunks: list[bytes]) -> tuple[object, ...]:
        told = Told()
        record = told.record()
        for chunk in chunks:
            record.feed("stderr", chunk)
        record.end("stderr")
        return told.lines, record.cause, record.last_error, record.last_words()

    assert kept(cut(output, data)) == kept([output])


def test_the_last_line_counts_without_its_newline() -> None:
    told = Told()
    record = told.record()
    record.feed("stderr", b"loading\nerror: half a li")
    assert record.last_words() == ["loading", "error: half a li"]
    record.end("stderr")
    assert (record.cause, record.last_error) == ("error", "error: half a li")
    assert told.lines[-1] == ("stderr", "error: half a li")
    assert record.last_words() == ["loading", "error: half a li"]


def test_a_line_without_newline_is_the_last_error_while_it_is_all_there_is() -> None:
    record = Told().record()
    record.feed("stderr", b"waiting for the GPU")
    assert record.last_error == "waiting for the GPU"


def test_ending_twice_tells_nothing_twice() -> None:
    told = Told()
    record = told.record()
    record.feed("stderr", b"once")
    record.end("stderr")
    record.end("stderr")
    assert told.lines == [("stderr", "once")]


def test_last_words_are_those_of_stderr() -> None:
    record = Told().record()
    record.feed("stdout", b"out\n")
    assert record.last_words() == ["out"]
    record.feed("stderr", b"err\n")
    assert record.last_words() == ["err"]


def test_last_words_are_bounded() -> None:
    record = Told().record()
    record.feed("stderr", b"".join(b"line %d\n" % number for number in range(10_000)))
    words = record.last_words()
    assert words[:2] == ["line 0", "line 1"]
    assert words[-1] == "line 9999"
    assert len(words) == FIRST_LINES + LAST_LINES + 1


def test_an_error_on_stdout_is_told_when_stderr_has_none() -> None:
    record = Told().record()
    record.feed("stderr", b"warming up\n")
    record.feed("stdout", b"bind: address already in use\n")
    assert (record.cause, record.last_error) == ("port_in_use", "bind: address already in use")


def test_an_error_on_stderr_goes_before_one_on_stdout() -> None:
    record = Told().record()
    record.feed("stdout", b"CUDA out of memory\n")
    record.feed("stderr", b"error: cannot go on\n")
    assert (record.cause, record.last_error) == ("error", "error: cannot go on")


def test_silence_is_told_as_silence() -> None:
    record = Told().record()
    record.end("stderr")
    record.end("stdout")
    assert (record.cause, record.last_error, record.last_words()) == ("unknown", "", [])


def test_noise_is_neither_told_nor_kept_nor_the_last_line() -> None:
    told = Told()
    record = told.record(noise=r'"GET /health HTTP')
    record.feed("stderr", b'loading\n127.0.0.1 - - "GET /health HTTP/1.1" 503 -\n')
    assert told.lines == [("stderr", "loading")]
    assert record.last_words() == ["loading"]
    assert record.last_error == "loading"


def flood(record: OutputRecord, line: bytes, count: int) -> None:
    """So many lines, in chunks of a size that none of it is passed over."""
    for start in range(0, count, 100):
        record.feed("stderr", line * min(100, count - start))


class TestFloods:
    LIMIT = OutputRecord.LINES_PER_SECOND

    def test_what_is_beyond_the_limit_of_a_second_is_withheld_and_counted(self) -> None:
        told = Told()
        record = told.record()
        flood(record, b"spam\n", self.LIMIT + 7)
        assert told.lines == [("stderr", "spam")] * self.LIMIT
        told.now += 1.0
        record.feed("stderr", b"next\n")
        assert told.lines[self.LIMIT :] == [("stderr", "[... 7 lines not logged ...]"), ("stderr", "next")]

    def test_the_count_is_told_at_the_end_at_the_latest(self) -> None:
        told = Told()
        record = told.record()
        flood(record, b"spam\n", self.LIMIT + 3)
        record.end("stderr")
        assert told.lines[-1] == ("stderr", "[... 3 lines not logged ...]")

    def test_a_new_second_is_a_new_allowance(self) -> None:
        told = Told()
        record = told.record()
        for _ in range(3):
            flood(record, b"line\n", self.LIMIT)
            told.now += 1.0
        assert told.lines == [("stderr", "line")] * (3 * self.LIMIT)

    def test_what_is_withheld_is_kept_and_diagnosed_all_the_same(self) -> None:
        told = Told()
        record = told.record()
        record.feed("stderr", b"spam\n" * self.LIMIT + b"CUDA out of memory\nthe end\n")
        assert (record.cause, record.last_error) == ("out_of_memory", "CUDA out of memory")
        assert record.last_words()[-2:] == ["CUDA out of memory", "the end"]

    @pytest.mark.parametrize("chunk", [1 << 8, 1 << 18, 1 << 20])
    @pytest.mark.parametrize("before", [0, 1000, 10_000, 30_000])
    def test_an_error_in_its_midst_is_found_wherever_it_stands(self, before: int, chunk: int) -> None:
        """What is too much to log is looked at all the same: how the pipe cut it must make no difference."""
        told = "Traceback (most recent call last):\n  File 'x'\nMemoryError"
        output = b"progress\n" * before + told.encode() + b"\n" + b"progress\n" * 10_000
        record = Told().record()
        for start in range(0, len(output), chunk):
            record.feed("stderr", output[start : start + chunk])
        record.end("stderr")
        assert (record.cause, record.last_error) == ("out_of_memory", "MemoryError")

    @given(st.lists(st.tuples(st.integers(1, 900), st.sampled_from([0.0, 0.4, 1.0, 5.0])), max_size=12))
    def test_every_line_is_either_told_or_counted(self, bursts: list[tuple[int, float]]) -> None:
        told = Told()
        record = told.record()
        for lines, pause in bursts:
            record.feed("stderr", b"x\n" * lines)
            told.now += pause
        record.end("stderr")
        counted = [int(line.split()[1]) for _, line in told.lines if line.startswith("[...")]
        plain = sum(line == "x" for _, line in told.lines)
        assert plain + sum(counted) == sum(lines for lines, _ in bursts)

    def test_lines_of_the_longest_kind_cost_little(self) -> None:
        record = OutputRecord(lambda stream, line, *, is_error: None)
        chunk = (b"\xff" * 8191 + b"\n") * 16
        tracemalloc.start()
        try:
            for _ in range(2 * MIB // len(chunk)):  # twice what is kept
                record.feed("stderr", chunk)
            current, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert current < 2 * MIB + (FIRST_LINES + LAST_LINES) * 1024
