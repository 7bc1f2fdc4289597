"""Durations and sizes as people write them: `"1h30m"`, `"64MiB"`, or a bare number of seconds or bytes."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Self

from mlxsup.sizes import format_size, rounded_size

__all__ = ["Duration", "Size", "format_duration", "format_size", "rounded_size"]

_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
_BYTES = {
    "b": 1,
    **{f"{letter}ib": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{f"{letter}b": 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
}
_MAX_SIZE = 2**63 - 1
_LONGEST = 1000
"""Characters of a duration or size; clients send them too, and long numbers take long to read."""

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_PARTS = re.compile(rf"({_NUMBER})\s*(ns|us|ms|s|m|h|d)\s*")
_DURATION = re.compile(rf"([+-]?)\s*({_NUMBER}|(?:{_PARTS.pattern})+)")
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")


class Duration(float):
    """A span of time in seconds, made from `"5m"`, `"1h30m"`, `"250ms"`, `"-1"` or a number of seconds.

    Negative means never where a key allows it. As text it reads the way it is written in a configuration.

    Raises:
        ValueError: the value is neither, with the right form in the message.
    """

    def __new__(cls, value: str | float) -> Self:
        """Read text, or take a number of seconds as it is."""
        seconds = _parse_duration(value) if isinstance(value, str) else _plain_number(value)
        if not math.isfinite(seconds):
            raise ValueError("a duration must be finite; a negative one means never where that is allowed")
        return super().__new__(cls, seconds)

    def __repr__(self) -> str:
        return f"Duration({format_duration(self)!r})"

    def __str__(self) -> str:
        return format_duration(self)


class Size(int):
    """A number of bytes, made from `"64MiB"`, `"1.5GB"` or a whole number of bytes.

    KiB, MiB, GiB, TiB count in 1024, KB, MB, GB, TB in 1000. As text it reads the way it is written in a configuration.

    Raises:
        ValueError: the value is neither, with the right form in the message.
    """

    def __new__(cls, value: str | int) -> Self:
        """Read text, or take a number of bytes as it is."""
        number = _parse_size(value) if isinstance(value, str) else _whole_number(value)
        if not 0 <= number <= _MAX_SIZE:
            raise ValueError(f"a size must be between 0 and {_MAX_SIZE} bytes")
        return super().__new__(cls, number)

    def __repr__(self) -> str:
        return f"Size({format_size(self)!r})"

    def __str__(self) -> str:
        return format_size(self)


def format_duration(seconds: float) -> str:
    """Write seconds so that Duration reads exactly the same number back: `5400.0` is `1h30m`."""
    sign = "-" if seconds < 0 else ""
    exact = abs(Fraction(seconds))
    thousandths = round(exact * 1000)
    if thousandths / 1000 != abs(seconds):
        return f"{sign}{Decimal(repr(abs(float(seconds)))):f}s"
    if not thousandths:
        return "0s"
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, part = divmod(rest, 1000)
    pieces = ((hours, "h"), (minutes, "m"), (whole, "s"), (part, "ms"))
    return sign + "".join(f"{count}{unit}" for count, unit in pieces if count)


def _parse_duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if not match:
        shown = _shown(text)
        raise ValueError(f'expected a duration such as "5m", "1h30m", "250ms" or a number of seconds, not {shown}')
    sign, body = match[1], match[2]
    parts = (
        _PARTS.findall(body) if body[-1].isalpha() else []
    )  # a bare number has none, however long one looks for them
    exact = sum((Fraction(number) * _SECONDS[unit] for number, unit in parts), Fraction()) if parts else Fraction(body)
    try:
        return float(-exact if sign == "-" else exact)
    except OverflowError:
        return math.inf


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST else f"{text[:20]!r} and {len(text) - 20} characters more"


def _plain_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'expected a duration such as "5m" or a number of seconds, not {value!r}')  # noqa: TRY004
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole_number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'expected a size such as "64MiB" or a whole number of bytes, not {value!r}')  # noqa: TRY004
    return value


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if not match:
        raise ValueError(f'expected a size such as "64MiB", "1.5GB" or a number of bytes, not {_shown(text)}')
    number, unit = match[1], match[2].lower()
    if unit and unit not in _BYTES:
        known = "B, KiB, MiB, GiB, TiB, KB, MB, GB or TB"
        raise ValueError(f"{match[2]!r} is no unit of size; use {known}")
    return int(Fraction(number) * _BYTES.get(unit, 1))
