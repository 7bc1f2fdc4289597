"""Durations and sizes read what people write, and what is written is read back exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxsup.config import Duration, Size, format_duration, format_size, rounded_size

finite = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.integers(min_value=0, max_value=2**63 - 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("90s", 90),
        ("1.5h", 5400),
        ("2d", 172800),
        ("10us", 1e-5),
        ("3ns", 3e-9),
        ("90", 90),
        ("0.1", 0.1),
        ("0", 0),
        ("-1", -1),
        ("-1m30s", -90),
        ("+5s", 5),
        (" 1h 30m ", 5400),
        (90, 90),
        (0.25, 0.25),
        (-1, -1),
    ],
)
def test_a_duration_is_seconds(text: str | float, seconds: float) -> None:
    assert Duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "5 minutes", "5M", "5m-3s", "1h30", "1e3", "nan", "inf", "٣s", "--1", "5m\n6x", ".5s"]
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="1h30m"):
        Duration(text)


@pytest.mark.parametrize("value", [True, None, [], {}])
def test_what_is_neither_text_nor_number_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        Duration(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, "9" * 400 + "d"])
def test_a_duration_is_finite(value: float | str) -> None:
    with pytest.raises(ValueError, match="finite"):
        Duration(value)


@given(finite)
@example(-0.0)
@example(5e-324)
@example(60.001)
@example(1.7e308)
def test_a_written_duration_is_read_back_exactly(seconds: float) -> None:
    assert Duration(format_duration(seconds)) == seconds


@given(st.integers(0, 999), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_whole_milliseconds_are_written_in_units(hours: int, minutes: int, seconds: int, thousandths: int) -> None:
    pieces = [(hours, "h"), (minutes, "m"), (seconds, "s"), (thousandths, "ms")]
    text = "".join(f"{count}{unit}" for count, unit in pieces if count) or "0s"
    assert format_duration(Duration(text)) == text
    assert str(Duration(text)) == text
    assert repr(Duration(text)) == f"Duration('{text}')"


@pytest.mark.parametrize("read", [Duration, Size])
@pytest.mark.parametrize("text", ["1" * 5_000_000, "x" * 5_000_000, "1h" * 2_000_000, "1" * 900])
def test_text_of_any_length_costs_no_time_and_is_not_told_again(read: Callable[[str], object], text: str) -> None:
    began, refusal = time.process_time(), ""
    try:
        read(text)
    except ValueError as error:
        refusal = str(error)
    assert len(refusal) < 5000
    assert time.process_time() - began < 1.0


def test_a_duration_counts_as_a_number() -> None:
    assert Duration("1m") + 1 == 61
    assert f"{Duration('1m'):.1f}" == "60.0"
    assert f"{Duration('1m')}" == "1m"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * 1024**2),
        ("4GiB", 4 * 1024**3),
        ("1.5GB", 1_500_000_000),
        ("1 KiB", 1024),
        ("1kb", 1000),
        ("2TiB", 2 * 1024**4),
        ("12B", 12),
        ("0", 0),
        ("1000", 1000),
        (1000, 1000),
    ],
)
def test_a_size_is_bytes(text: str | int, size: int) -> None:
    assert Size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "-1MiB", "1e9", "64 Mi B", "0x10", "1,5GB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="64MiB"):
        Size(text)


@pytest.mark.parametrize("text", ["5M", "5G", "5MX", "5bytes"])
def test_units_that_are_not_plain_are_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ValueError, match="use B, KiB, MiB"):
        Size(text)


@pytest.mark.parametrize("value", [True, 1.5, None])
def test_what_is_no_whole_number_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        Size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 2**63, "9" * 30 + "TiB"])
def test_a_size_fits_in_63_bits(value: int | str) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        Size(value)


@given(sizes)
@example(0)
@example(1024**4)
@example(10**12)
def test_a_written_size_is_read_back_exactly(size: int) -> None:
    assert Size(format_size(size)) == size
    assert str(Size(size)) == format_size(size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1503238554, "1.4 GiB"),
        (2**50, "1024.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_a_rounded_size_is_for_a_glance(size: int, text: str) -> None:
    assert rounded_size(size) == text
