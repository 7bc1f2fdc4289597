"""What a runner says instead of an answer, or in the middle of one, as the error that its caller gets."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from mlxsup.errors import BY_CODE, MlxsupError, RunnerError

MAX_MESSAGE = 2000
MAX_RETRY_AFTER = 86_400.0

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading JSON that is none may raise."""


def runner_refusal(status: int, body: bytes, retry_after: str | None = None) -> MlxsupError:
    """Turn a runner's non-200 answer into an error: its own message, trimmed, its own status and `Retry-After`."""
    text = body.decode("utf-8", errors="replace").strip()
    found: object = None
    with suppress(*UNREADABLE):
        found = msgspec.json.decode(text)
    error = found.get("error", found) if isinstance(found, dict) else None
    kind, message = _read_error(error, text)
    message = message or f"the runner answered {status} without a word"
    shown = status if 400 <= status < 600 else 502  # a status that is no error cannot be passed on as one
    return kind(message, status=shown, retry_after=_seconds(retry_after), details={"runner_status": status})


def stream_error(line: bytes | bytearray) -> MlxsupError | None:
    """Return the error that a line of an answer reports in its field `error`, None where that is empty or not there.

    Where the field names an error of ours, that is what it becomes, with its status; anything else is a RunnerError of 500.
    """
    if b'"error"' not in line:
        return None
    try:
        error = _decoder.decode(line).error
    except UNREADABLE:
        return None
    if not error:
        return None
    kind, message = _read_error(error, msgspec.json.encode(error).decode())
    told = error.get("status") if isinstance(error, dict) else None
    status = told if isinstance(told, int) and 400 <= told < 600 else 500 if kind is RunnerError else None
    return kind(message or "the runner reports an error without a word", status=status)


class _Reported(msgspec.Struct, frozen=True):
    """What of a line is looked at for an error."""

    error: Any = None


_decoder = msgspec.json.Decoder(_Reported)


def _read_error(error: object, text: str) -> tuple[type[MlxsupError], str]:
    """Return the class that belongs to an error's code, and its message, trimmed: `text` where it has none."""
    code = ""
    if isinstance(error, dict):
        code = str(error.get("code", ""))
        text = error["message"] if isinstance(error.get("message"), str) else text
    elif isinstance(error, str):
        text = error
    return BY_CODE.get(code, RunnerError), text[:MAX_MESSAGE].strip()


def _seconds(retry_after: str | None) -> float | None:
    """Read a `Retry-After` header: seconds, or a date; None when it is neither."""
    told = (retry_after or "").strip()
    if told.isascii() and told.isdecimal():
        return min(float(told), MAX_RETRY_AFTER)
    with suppress(ValueError, TypeError, OverflowError):  # a date without a zone is not to be compared with ours
        ahead = parsedate_to_datetime(told) - datetime.now(UTC)
        return min(max(0.0, ahead.total_seconds()), MAX_RETRY_AFTER)
    return None
