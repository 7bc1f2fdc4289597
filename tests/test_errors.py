"""Every way a call can fail has a class, a code, a status, and comes through a copy unharmed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from mlxsup import errors
from mlxsup.errors import BY_CODE, ConfigError, EngineUnavailable, LoadFailed, MlxsupError


def every(kind: type[MlxsupError] = MlxsupError) -> Iterator[type[MlxsupError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from every(below)


KINDS = list(every())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("unsupported_parameter", 400),
        ("unauthorized", 401),
        ("forbidden", 403),
        ("model_not_found", 404),
        ("conflict", 409),
        ("body_too_large", 413),
        ("not_supported", 501),
        ("runner_error", 502),
        ("runner_died", 502),
        ("bad_answer", 502),
        ("queue_full", 503),
        ("loading", 503),
        ("unloaded", 503),
        ("backoff", 503),
        ("shutting_down", 503),
        ("resource_exhausted", 503),
        ("load_timeout", 504),
        ("stalled", 504),
        ("deadline", 504),
        ("does_not_fit", 507),
        ("load_failed", 500),
        ("config_error", 500),
        ("internal", 500),
    ],
)
def test_each_code_has_its_status(code: str, status: int) -> None:
    assert BY_CODE[code]("x").status == status
    assert BY_CODE[code].code == code


def test_every_class_is_found_by_its_code() -> None:
    for kind in KINDS:
        assert issubclass(kind, BY_CODE[kind.code]), f"{kind.__name__} would come back as {BY_CODE[kind.code].__name__}"


def test_of_several_with_one_code_it_is_the_most_general() -> None:
    assert BY_CODE["load_failed"] is LoadFailed
    assert EngineUnavailable.code == "load_failed"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_copy_for_another_waiter_says_the_same(kind: type[MlxsupError]) -> None:
    first = kind("no", status=418, retry_after=2.5, details={"a": [1]})
    again = first.again()
    assert type(again) is kind
    assert again is not first
    assert (again.message, str(again), again.status, again.retry_after) == ("no", "no", 418, 2.5)
    assert again.details == first.details
    again.details["b"] = 1
    assert "b" not in first.details


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_it_says_of_who_failed(kind: type[MlxsupError]) -> None:
    ours = kind("x")
    assert ours.source in ("mlxsup", "runner")
    assert kind.__doc__
    assert json.dumps(ours.details) == "{}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_passes_says_when_to_come_again(kind: type[MlxsupError]) -> None:
    assert (kind("x").retry_after is not None) == (kind.default_status == 503)
    assert kind("x", retry_after=7).retry_after == 7


def test_whose_fault_it_is() -> None:
    of_runner = {kind.__name__ for kind in KINDS if kind.source == "runner"}
    assert of_runner == {"RunnerError", "RunnerDied", "BadAnswer", "LoadFailed"}


def test_permanent_is_what_its_details_say() -> None:
    assert LoadFailed("x", details={"permanent": True}).permanent
    assert not LoadFailed("x").permanent


def test_a_configuration_error_lists_its_problems() -> None:
    assert ConfigError("bad", details={"problems": ["a: no", "b: no"]}).problems == ["a: no", "b: no"]
    assert ConfigError("bad").problems == ["bad"]
