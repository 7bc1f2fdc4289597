"""Errors: one shape and the right headers for all of them, ours, the router's and the unexpected ones."""

from __future__ import annotations

import logging

import pytest

from mlxsup import Supervisor
from mlxsup.api.answers import error_object
from mlxsup.errors import Backoff, DoesNotFit, LoadFailed, MlxsupError, ModelNotFound, QueueFull, RunnerDied
from mlxsup.testing import fake_runner

from .serving import serving

pytestmark = pytest.mark.anyio

MODELS = {"heart": fake_runner()}


def _raising(error: Exception) -> object:
    async def load(*_: object, **__: object) -> None:
        raise error

    return load


async def test_an_unknown_model_is_404_and_names_the_close_match() -> None:
    async with serving(MODELS) as api:
        for path, body in (("/completion", {"model": "haert", "prompt": "p"}), ("/models/load", {"model": "haert"})):
            status, answer = await api.post(path, body)
            assert (status, answer["error"]["code"]) == (404, "model_not_found")
            assert "did you mean heart?" in answer["error"]["message"]
            assert answer["error"]["details"]["suggestion"] == "heart"


async def test_the_body_of_an_error_has_the_keys_that_openai_clients_read() -> None:
    async with serving(MODELS) as api:
        _, answer = await api.post("/completion", {"model": "heart", "prompt": "p", "steps": "many"})
        assert answer == {
            "error": {
                "message": "steps: expected int or null, got str",
                "type": "invalid_request_error",
                "param": "steps",
                "code": "invalid_request",
                "src": "mlxsup",
                "status": 400,
                "details": {"param": "steps"},
            }
        }


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "should_retry"),
    [
        (QueueFull("full", retry_after=0.2), 503, "1", None),
        (Backoff("soon", retry_after=3.2), 503, "4", None),
        (DoesNotFit("too large"), 507, None, "false"),
        (DoesNotFit("others hold it", retry_after=15.0), 507, "15", "true"),
        (LoadFailed("no"), 500, None, "false"),
        (RunnerDied("gone", details={"exit_code": 1}), 502, None, None),
    ],
)
async def test_headers_tell_a_client_whether_to_come_back(
    error: MlxsupError, status: int, retry_after: str | None, should_retry: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervisor, "load", _raising(error))
    async with serving(MODELS) as api, api.http.post("/models/load", json={"model": "heart"}) as answer:
        assert answer.status == status
        assert answer.headers.get("Retry-After") == retry_after
        assert answer.headers.get("x-should-retry") == should_retry
        assert (await answer.json())["error"].get("details", {}) == error.details


async def test_a_path_and_a_method_that_are_not_there_look_like_every_other_error() -> None:
    async with serving(MODELS) as api:
        async with api.http.get("/nowhere") as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["message"]) == (404, "not_found", "there is no /nowhere here")
            assert answer.headers["x-request-id"]
        async with api.http.get("/completion") as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (405, "method_not_allowed")
            assert answer.headers["Allow"] == "POST"


async def test_what_nobody_expected_is_500_and_its_traceback_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Supervisor, "load", _raising(ZeroDivisionError("secret")))
    async with serving(MODELS) as api:
        status, answer = await api.post("/models/load", {"model": "heart"}, **{"x-request-id": "abc"})
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "abc" in answer["error"]["message"]
    assert "secret" not in answer["error"]["message"]
    logged = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert logged.exc_info is not None
    assert logged.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/models"])
async def test_every_answer_carries_a_request_id(path: str) -> None:
    async with serving(MODELS) as api:
        async with api.http.get(path, headers={"x-request-id": "mine-1"}) as answer:
            assert answer.headers["x-request-id"] == "mine-1"
        made = set()
        for headers in ({}, {}, {"x-request-id": "no good"}, {"x-request-id": "x" * 200}):
            async with api.http.get(path, headers=headers) as answer:
                made.add(answer.headers["x-request-id"])
        assert len(made) == 4
        assert all(name.startswith("req-") for name in made)


async def test_a_stream_carries_a_request_id_too() -> None:
    async with serving(MODELS) as api:
        body = {"model": "heart", "prompt": "p"}
        async with api.http.post("/completion", json=body, headers={"x-request-id": "mine"}) as answer:
            assert answer.headers["x-request-id"] == "mine"


def test_an_error_says_after_how_many_seconds_to_come_back_in_its_body_too() -> None:
    assert error_object(QueueFull("full", retry_after=1.5))["retry_after"] == 1.5
    assert "retry_after" not in error_object(ModelNotFound("no"))
