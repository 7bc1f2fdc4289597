"""Bytes of an answer become lines: exactly those that were sent, however the network cut them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.errors import BadAnswer
from mlxsup.runners.relay import LineFramer

from .chunking import cut

LINES = st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"", b"\r", b"\0", b"{}"])), max_size=20).map(
    lambda lines: [line.replace(b"\n", b"") for line in lines]
)
REST = st.binary(max_size=30).map(lambda rest: rest.replace(b"\n", b""))


@given(LINES, REST, st.data())
def test_any_split_gives_exactly_the_lines(lines: list[bytes], rest: bytes, data: st.DataObject) -> None:
    sent = b"".join(line + b"\n" for line in lines) + rest
    framer = LineFramer()
    found = [line for chunk in cut(sent, data) for line in framer.feed(chunk)]
    assert (found, framer.rest) == (lines, rest)


@given(st.binary(max_size=200))
def test_byte_by_byte_too(sent: bytes) -> None:
    framer = LineFramer()
    found = [line for byte in sent for line in framer.feed(bytes([byte]))]
    assert b"\n".join([*found, framer.rest]) == sent


@pytest.mark.parametrize("size", [1 << 16, 64 << 20])
def test_a_line_of_64_mib_comes_out_whole(size: int) -> None:
    framer = LineFramer()
    chunk = bytes(range(11, 256)) * 1024
    whole = (chunk * (size // len(chunk) + 1))[:size]
    found = [line for at in range(0, size, 1 << 16) for line in framer.feed(whole[at : at + (1 << 16)])]
    assert found == []
    assert framer.feed(b"\nnext") == [whole]
    assert framer.rest == b"next"


def test_a_line_beyond_the_limit_is_refused_while_it_grows() -> None:
    framer = LineFramer(max_line=10)
    framer.feed(b"0123456789")
    with pytest.raises(BadAnswer, match="longer than 10 bytes"):
        framer.feed(b"x")


@given(st.integers(0, 20), st.data())
def test_the_limit_holds_wherever_the_line_is_cut(size: int, data: st.DataObject) -> None:
    framer = LineFramer(max_line=10)
    chunks = cut(b"x" * size + b"\n", data)
    if size <= 10:
        assert [line for chunk in chunks for line in framer.feed(chunk)] == [b"x" * size]
    else:
        with pytest.raises(BadAnswer):
            for chunk in chunks:
                framer.feed(chunk)
