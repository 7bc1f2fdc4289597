"""What an answer of the health path means on the NDJSON wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.engines import Verdict
from mlxsup.engines.wire import read_health, read_memory
from mlxsup.protocol import RunnerMemory


@pytest.mark.parametrize("body", [b'{"status":"ok","pid":7,"busy":true,"memory":{"active":1}}', b"", b"OK", b"{"])
def test_200_is_ready_whatever_it_says(body: bytes) -> None:
    assert read_health(200, body).verdict is Verdict.READY


@pytest.mark.parametrize(
    ("body", "progress", "detail"),
    [
        (b'{"status":"loading","progress":0.25}', 0.25, "health answered 503 (loading)"),
        (b'{"status":"loading"}', None, "health answered 503 (loading)"),
        (b'{"status":"loading","progress":null}', None, "health answered 503 (loading)"),
        (b'{"status":"loading","progress":1}', 1.0, "health answered 503 (loading)"),
        (b'{"status":"loading","progress":0.5,"unknown":[{}]}', 0.5, "health answered 503 (loading)"),
        (b'{"progress":"half"}', None, "health answered 503"),
        (b'{"error":{"code":503,"message":"Loading model"}}', None, "health answered 503"),
        (b'{"status":"","progress":0.5}', 0.5, "health answered 503"),
        (b"Service Unavailable", None, "health answered 503"),
        (b"", None, "health answered 503"),
        (b"[]", None, "health answered 503"),
        (b'{"status":"\xff"}', None, "health answered 503"),
        (b'{"a":' * 10_000, None, "health answered 503"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_503_is_loading_and_says_how_far_it_is(body: bytes, progress: float | None, detail: str) -> None:
    found = read_health(503, body)
    assert (found.verdict, found.progress, found.detail) == (Verdict.LOADING, progress, detail)


@pytest.mark.parametrize("status", [204, 301, 400, 404, 500, 502])
def test_everything_else_is_not_yet(status: int) -> None:
    assert read_health(status, b"").verdict is Verdict.LOADING


@given(st.integers(100, 599), st.binary(max_size=200))
def test_no_body_is_too_odd(status: int, body: bytes) -> None:
    assert read_health(status, body).verdict is (Verdict.READY if status == 200 else Verdict.LOADING)


@pytest.mark.parametrize(
    ("body", "memory"),
    [
        (b'{"status":"ok","memory":{"active":1,"peak":3,"cache":2}}', RunnerMemory(active=1, peak=3, cache=2)),
        (b'{"status":"ok","memory":{"active":1}}', RunnerMemory(active=1)),
        (b'{"status":"ok"}', None),
        (b'{"memory":{"active":"much"}}', None),
        (b"OK", None),
        (b"", None),
        (b'{"a":' * 10_000, None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_runner_may_say_what_memory_it_has(body: bytes, memory: RunnerMemory | None) -> None:
    assert read_memory(body) == memory
