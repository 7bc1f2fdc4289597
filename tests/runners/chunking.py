"""Cutting bytes into chunks at places that hypothesis chooses, as a network or a pipe might."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st


def cut(whole: bytes, data: st.DataObject) -> list[bytes]:
    """Chunks that make up `whole`; some may be empty."""
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=20).map(sorted), label="cut at")
    return [whole[start:end] for start, end in pairwise([0, *places, len(whole)])]
