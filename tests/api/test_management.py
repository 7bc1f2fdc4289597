"""Models, runners, health and version: what is there, and what is loaded."""

from __future__ import annotations

import asyncio
import os
import time
from statistics import median
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from mlxsup import __version__
from mlxsup.cli.client import Client
from mlxsup.config import Size
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .serving import Api, serving

pytestmark = pytest.mark.anyio

WIDE = 0.1
"""Seconds: ten times what a status may take, for machines that are busy. `python -m tests.bench status` measures it."""


async def _status(api: Api, model: str = "m") -> dict[str, object]:
    _, answer = await api.get("/models")
    found: dict[str, object] = next(entry["status"] for entry in answer["data"] if entry["id"] == model)
    return found


async def test_health_and_version() -> None:
    async with serving({"m": fake_runner()}) as api:
        assert await api.get("/health") == (200, {"status": "ok"})
        assert await api.get("/version") == (200, {"name": "mlxsup", "version": __version__})
        await api.sup.drain()
        assert await api.get("/health") == (503, {"status": "closing"})
        status, code, _ = await api.refusal("/completion", {"model": "m", "prompt": "p"})
        assert (status, code) == (503, "shutting_down")


async def test_models_are_listed_in_the_words_of_llama_cpp_while_they_come_and_go() -> None:
    async with Gate() as gate:
        slow = fake_runner(f"load=0.05; gate@loading={gate.path}; gate@sigterm={gate.path}", aliases=["other"])
        async with serving({"m": slow, "n": fake_runner()}) as api:
            assert await _status(api) == {"value": "unloaded", "state": "stopped"}
            loading = asyncio.create_task(api.post("/models/load", {"model": "other"}))
            arrival = await gate.arrival()
            found = await _status(api)
            assert (found["value"], found["state"]) == ("loading", "starting")
            arrival.go()
            assert await loading == (200, {"success": True})
            assert await _status(api) == {"value": "loaded", "state": "ready"}
            unloading = asyncio.create_task(api.post("/models/unload", {"model": "m"}))
            arrival = await gate.arrival()
            assert await _status(api) == {"value": "unloading", "state": "stopping"}
            assert not unloading.done()
            arrival.go()
            assert await unloading == (200, {"success": True})
            assert await _status(api) == {"value": "unloaded", "state": "stopped", "exit_code": 0}
            _, listed = await api.get("/models")
            assert [(entry["id"], entry["object"], entry["aliases"]) for entry in listed["data"]] == [
                ("m", "model", ["other"]),
                ("n", "model", []),
            ]


async def test_a_failed_model_is_listed_with_its_exit_code() -> None:
    async with serving({"m": fake_runner("exit=7")}) as api:
        assert (await api.post("/models/load", {"model": "m"}))[0] == 500
        await until(lambda: api.sup.report("m").state in ("failed", "backoff"))
        found = await _status(api)
        assert (found["value"], found["failed"], found["exit_code"]) == ("unloaded", True, 7)


async def test_a_load_that_is_not_there_in_time_goes_on_without_who_asked() -> None:
    async with Gate() as gate, serving({"m": fake_runner(f"gate@loading={gate.path}")}) as api:
        status, answer = await api.post("/models/load", {"model": "m"}, **{"Mlxsup-Deadline": "500ms"})
        assert (status, answer["error"]["code"], answer["error"]["details"]["limit"]) == (504, "deadline", 0.5)
        (await gate.arrival()).go()
        await until(lambda: api.sup.report("m").state == "ready")


@pytest.mark.parametrize(
    ("limit", "scenario", "path", "stage"),
    [
        ("queue_timeout", "gate@loading", "/models/load", "loading"),
        ("first_chunk_timeout", "gate@request#1", "/completion", "first_chunk"),
    ],
)
async def test_limits_are_told_in_numbers(limit: str, scenario: str, path: str, stage: str) -> None:
    limits: dict[str, Any] = {limit: "500ms"}
    async with Gate() as gate, serving({"m": fake_runner(f"{scenario}={gate.path}", **limits)}) as api:
        body = {"model": "m"}
        if path == "/completion":
            await api.sup.load("m")
            body["prompt"] = "p"
        status, answer = await api.post(path, body)
        assert (status, answer["error"]["details"]["stage"]) == (504, stage)
        assert answer["error"]["details"]["limit"] == 0.5


async def test_what_would_happen_and_what_devices_have() -> None:
    async with serving({"m": fake_runner(aliases=["other"])}) as api:
        _, answer = await api.get("/explain?model=other")
        assert answer["explanation"].startswith("loaded at once: m needs 64.0 MiB on ")
        assert (await api.get("/explain?model=nobody"))[0] == 404
        await api.sup.load("m")
        _, answer = await api.get("/explain?model=m")
        assert answer["explanation"] == "granted at once: it is ready"
        _, answer = await api.get("/runners")
        (device,) = answer["devices"]
        assert device["total"] > device["available"] > 0
        assert device["reserved"] >= 64 << 20
        assert (device["low"], device["note"]) == (False, "")


async def test_unload_is_answered_when_the_process_is_gone() -> None:
    async with serving({"m": fake_runner()}) as api:
        await api.post("/models/load", {"model": "m"})
        _, answer = await api.get("/runners")
        pid = answer["runners"][0]["pid"]
        os.kill(pid, 0)
        await api.post("/models/unload", {"model": "m"})
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_an_unload_that_is_not_done_in_time_goes_on_without_who_asked() -> None:
    async with Gate() as gate, serving({"m": fake_runner(f"gate@sigterm={gate.path}", stop_grace="30s")}) as api:
        await api.sup.load("m")
        status, answer = await api.post("/models/unload", {"model": "m"}, **{"Mlxsup-Deadline": "500ms"})
        assert (status, answer["error"]["code"]) == (504, "deadline")
        assert answer["error"]["details"] == {"model": "m", "stage": "unloading", "limit": 0.5}
        assert api.sup.report("m").state == "stopping"
        (await gate.arrival()).go()
        await until(lambda: api.sup.report("m").state == "stopped")


async def test_unloading_by_force_does_not_wait_for_work() -> None:
    async with (
        serving({"m": fake_runner("tokens=2; hang@1")}) as api,
        api.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer,
    ):
        await answer.content.readline()
        with anyio.fail_after(LIMIT / 2):
            assert (await api.post("/models/unload", {"model": "m", "force": True}))[0] == 200
        assert b'"code":"unloaded"' in await answer.read()


async def test_what_the_server_was_made_with_holds_after_a_reload() -> None:
    """Half of it cannot change, so none does."""
    async with serving({"m": fake_runner("tokens=1")}) as api:
        before = api.sup.settings
        await api.sup.reload(replace(before, server=replace(before.server, max_body=Size(5))))
        assert (await api.post("/models/load", {"model": "m"}))[0] == 200
        assert (await api.lines("m"))[-1]["done"] is True


async def test_loading_may_say_how_long_the_model_stays() -> None:
    async with serving({"m": fake_runner()}) as api:
        assert (await api.post("/models/load", {"model": "m", "keep_alive": -1}))[0] == 200
        assert api.sup.report("m").expires is None
        assert (await api.post("/models/load", {"model": "m", "keep_alive": "30m"}))[0] == 200
        assert api.sup.report("m").expires is not None


async def test_status_is_answered_while_five_loads_hang() -> None:
    models = {f"m{number}": fake_runner("load=forever; progress=0.5") for number in range(5)}
    async with serving(models) as api, Client(f"http://127.0.0.1:{api.port}") as client:
        loads = [asyncio.create_task(api.post("/models/load", {"model": model})) for model in models]
        with anyio.fail_after(LIMIT):
            while not all(report.pid > 0 and report.progress for report in await client.runners()):
                await asyncio.sleep(0.01)
        times = []
        for path in ("/runners", "/models", "/health") * 20:
            began = time.perf_counter()
            assert (await api.get(path))[0] == 200
            times.append(time.perf_counter() - began)
        for _ in range(20):
            began = time.perf_counter()
            assert {report.state for report in await client.runners()} == {"starting"}, "what `mlxsup ps` asks"
            times.append(time.perf_counter() - began)
        assert median(times) < WIDE
        for model in models:
            await api.post("/models/unload", {"model": model, "force": True})
        for load in loads:
            status, answer = await load
            assert (status, answer["error"]["code"]) == (503, "unloaded")


async def test_runners_report_what_a_person_wants_to_know() -> None:
    async with serving({"m": fake_runner(path="/models/m"), "n": fake_runner()}) as api:
        await api.post("/models/load", {"model": "m"})
        _, answer = await api.get("/runners")
        loaded, other = answer["runners"]
        assert (loaded["model"], loaded["state"], loaded["path"]) == ("m", "ready", "/models/m")
        assert loaded["address"].startswith("unix:")
        assert loaded["expires"] > loaded["started"]
        assert (other["state"], other["pid"]) == ("stopped", -1)


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
async def test_bad_bodies_are_refused(path: str) -> None:
    async with serving({"m": fake_runner()}) as api:
        for body, message in (
            ({}, "model: missing"),
            ({"model": "m", "forced": True}, "forced: unknown key"),
            ({"model": 1}, "model: expected str, got int"),
        ):
            status, code, found = await api.refusal(path, body)
            assert (status, code) == (400, "invalid_request")
            assert found.startswith(message)
