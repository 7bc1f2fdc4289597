"""Chunks of output become lines: the same ones however they were cut, in bounded memory, readable for people."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.runners.output import FIRST_LINES, LAST_LINES, LINE_HEAD, LINE_TAIL, LastWords, LineSplitter, clean

from .chunking import cut

MIB = 1 << 20

OUTPUT = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\n", b"\r", b"\r\n", b"\xc3", b"\xa9", b"\x1b[31m", b"\x1b", b"\0", "é\u2028".encode()]),
        st.integers(LINE_HEAD - 2, LINE_HEAD + LINE_TAIL + 2).map(lambda size: b"x" * size),
    ),
    max_size=30,
).map(b"".join)


def lines_of(*chunks: bytes) -> list[str]:
    """What a splitter makes of these chunks, the unfinished line at the end included."""
    lines: list[str] = []
    splitter = LineSplitter(lines.append, lambda count: None)
    for chunk in chunks:
        splitter.feed(chunk)
    splitter.flush()
    return lines


@given(OUTPUT, st.data())
def test_the_same_lines_however_the_output_is_cut(output: bytes, data: st.DataObject) -> None:
    assert lines_of(*cut(output, data)) == lines_of(output)


@given(OUTPUT)
def test_byte_by_byte_is_no_different(output: bytes) -> None:
    assert lines_of(*(output[at : at + 1] for at in range(len(output)))) == lines_of(output)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=50), max_size=20))
def test_plain_lines_come_out_as_they_went_in(lines: list[str]) -> None:
    assert lines_of("".join(f"{line}\n" for line in lines).encode()) == lines


def test_a_line_without_newline_counts_at_the_end() -> None:
    assert lines_of(b"one\ntw", b"o") == ["one", "two"]


def test_the_line_in_hand_can_be_looked_at() -> None:
    lines: list[str] = []
    splitter = LineSplitter(lines.append, lambda count: None)
    splitter.feed(b"one\nhalf a l")
    assert (lines, splitter.pending()) == (["one"], "half a l")
    splitter.feed(b"ine\n")
    assert (lines, splitter.pending()) == (["one", "half a line"], "")


def test_empty_lines_are_left_out() -> None:
    assert lines_of(b"\n\none\n\n \r\n\x1b[0m\n") == ["one"]


@pytest.mark.parametrize("size", [0, 1, LINE_HEAD, LINE_HEAD + 1, LINE_HEAD + LINE_TAIL])
def test_a_line_of_up_to_8_kib_is_whole(size: int) -> None:
    line = ("0123456789" * size)[:size]
    assert lines_of(line.encode() + b"\n") == ([line] if size else [])


def test_of_a_longer_line_the_middle_is_left_out_and_counted() -> None:
    (line,) = lines_of(b"a" * LINE_HEAD + b"b" * 1000 + b"c" * LINE_TAIL)
    assert line == "a" * LINE_HEAD + " [... 1000 bytes left out ...] " + "c" * LINE_TAIL


def test_the_line_after_a_long_one_is_its_own() -> None:
    assert lines_of(b"a" * 100_000 + b"\nnext\n")[1] == "next"


@pytest.mark.parametrize("chunk", [b"x" * 65536, b"x" * 100, b"\r" * 65536, b"\xff" * 65536, b"50%|#####\r" * 6554])
def test_100_mb_without_newline_cost_less_than_2_mib(chunk: bytes) -> None:
    size = 100 * MIB if len(chunk) > 1000 else 10 * MIB  # tiny chunks are slow under tracemalloc
    lines: list[str] = []
    splitter = LineSplitter(lines.append, lambda count: None)
    tracemalloc.start()
    try:
        for _ in range(size // len(chunk)):
            splitter.feed(chunk)
        splitter.feed(b"the tail")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB
    splitter.flush()
    assert len(lines) == 1
    assert lines[0].endswith("the tail")
    assert len(lines[0]) < 9000


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain", "plain"),
        (b"spaces at the end  \r\n", "spaces at the end"),
        (b"  indented", "  indented"),
        (b"a\tb", "a\tb"),
        ("caf\u00e9 \u2713".encode(), "caf\u00e9 \u2713"),
        (b"caf\xe9", "caf\ufffd"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"cut \xe2\x9c", "cut \ufffd"),
        (b"nul\0 bell\7 back\b", "nul bell back"),
        (b"\x1b[1;31mred\x1b[0m text", "red text"),
        (b"\x1b[38;5;196mred\x1b[m", "red"),
        (b"\x1b[2K\x1b[1Gcleared", "cleared"),
        (b"\x1b[?25lhidden\x1b[?25h", "hidden"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"  0%|    |\r 50%|##  |\r100%|####| 4/4", "100%|####| 4/4"),
        (b"  0%|    |\r100%|####| 4/4\r", "100%|####| 4/4"),
        (b"loading...\r          \rdone", "done"),
    ],
)
def test_a_line_is_made_readable(raw: bytes, shown: str) -> None:
    assert clean(raw) == shown


def test_a_long_progress_bar_is_shown_as_it_ended() -> None:
    bar = b"".join(b"\r%3d%%|%-80s|" % (percent, b"#" * percent) for percent in range(101))
    assert len(bar) > LINE_HEAD + LINE_TAIL
    (line,) = lines_of(bar + b"\n")
    assert line.endswith(f"100%|{'#' * 100}|")
    assert line.count("%|") == 1, "earlier states of the bar are shown with it"


class TestLastWords:
    @given(st.integers(0, 400))
    def test_the_first_and_the_last_are_kept_in_order(self, count: int) -> None:
        words = LastWords()
        for number in range(count):
            words.add(f"line {number}")
        kept = words.lines()
        gap = count - FIRST_LINES - LAST_LINES
        if gap <= 0:
            assert kept == [f"line {number}" for number in range(count)]
        else:
            first = [f"line {number}" for number in range(FIRST_LINES)]
            last = [f"line {number}" for number in range(count - LAST_LINES, count)]
            assert kept == [*first, f"[... {gap} lines left out ...]", *last]

    def test_it_is_20_and_100_lines(self) -> None:
        assert (FIRST_LINES, LAST_LINES) == (20, 100)
