"""What callers may write for how long: seconds or text, and one line that names the field when it is neither."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxsup import terms
from mlxsup.errors import InvalidRequest


@pytest.mark.parametrize(
    ("told", "seconds"),
    [(0, 0), (-1, -1), (2.5, 2.5), (10**9, 1e9), ("90", 90), ("5m", 300), ("1h30m", 5400), ("-1", -1), ("250ms", 0.25)],
)
def test_seconds_or_text(told: float | str, seconds: float) -> None:
    assert terms.keep_alive(told) == seconds
    assert terms.keep_alive(None) is None
    assert terms.deadline(None) is None
    if seconds > 0:
        assert terms.deadline(told) == seconds


@pytest.mark.parametrize("told", ["soon", "", "5 parsecs", "nan", "1e400", math.nan, math.inf, True, [5], 10**400])
def test_anything_else_is_refused_by_the_fields_name(told: Any) -> None:
    for read, name in ((terms.keep_alive, "keep_alive"), (terms.deadline, "deadline")):
        with pytest.raises(InvalidRequest, match=f"^{name}: .*duration") as caught:
            read(told)
        assert caught.value.details == {"param": name}
        with pytest.raises(InvalidRequest, match=r"^--flag: "):
            read(told, "--flag")


@pytest.mark.parametrize("told", [0, -1, "0s", "-5m"])
def test_a_deadline_is_more_than_nothing(told: float | str) -> None:
    with pytest.raises(InvalidRequest, match=r"^deadline: must be more than 0, not") as caught:
        terms.deadline(told)
    assert caught.value.details == {"param": "deadline"}
