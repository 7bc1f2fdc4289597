"""How long one request may take and its model shall stay after it, as callers write it; and what is said when time is over."""

from __future__ import annotations

from typing import Final, Literal

from mlxsup.config import Duration
from mlxsup.errors import DeadlineExceeded, InvalidRequest

Span = float | str | None
"""A span of time as callers give it: seconds, text such as `"5m"`, or None for nothing said."""

Stage = Literal["queue", "loading", "first_chunk", "answer", "unloading"]
"""What a request waits for: its turn, the load of its model, the first piece of its answer, the rest of it, the model's end."""

_STAGES: Final[dict[Stage, str]] = {
    "queue": "while it waited for its turn",
    "loading": "while its model was being loaded",
    "first_chunk": "before the first piece of its answer",
    "answer": "in the middle of its answer",
    "unloading": "before its model was gone",
}


def keep_alive(value: Span, name: str = "keep_alive") -> float | None:
    """Return the seconds that a model shall stay after its last use: 0 not at all, negative for ever.

    Raises:
        InvalidRequest: no span of time; the message and `param` of its details say `name`.
    """
    return None if value is None else _seconds(value, name)


def deadline(value: Span, name: str = "deadline") -> float | None:
    """Return the seconds that a request may take.

    Raises:
        InvalidRequest: no span of time, or none that is more than 0; as for `keep_alive`.
    """
    if value is None:
        return None
    seconds = _seconds(value, name)
    if seconds <= 0:
        raise InvalidRequest(f"{name}: must be more than 0, not {value!r}", details={"param": name})
    return seconds


def waited_too_long(model: str, stage: Stage, limit: float) -> DeadlineExceeded:
    """Return the error of a request that did not get a place within the `queue_timeout` of its model, in seconds."""
    what = "was not loaded" if stage == "loading" else "had no free place"
    return DeadlineExceeded(
        f"{model} {what} within its queue_timeout of {limit:g} s",
        details={"model": model, "stage": stage, "limit": float(limit)},
    )


def out_of_time(model: str, stage: Stage, limit: float) -> DeadlineExceeded:
    """Return the error of a request whose own deadline, in seconds, has passed."""
    return DeadlineExceeded(
        f"the request's deadline of {limit:g} s has passed {_STAGES[stage]}",
        details={"model": model, "stage": stage, "limit": limit},
    )


def _seconds(value: float | str, name: str) -> float:
    try:
        return float(Duration(value))
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", details={"param": name}) from None
