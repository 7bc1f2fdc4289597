"""`POST /completion`: chunks as they come, the right status before the first, an error line after it."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import aiohttp
import anyio
import pytest

from mlxsup.testing import Gate, fake_runner, picture
from tests.waiting import LIMIT, until

from .serving import Api, serving

pytestmark = pytest.mark.anyio


async def test_text_comes_as_lines_that_end_with_done_and_a_seed() -> None:
    async with serving({"m": fake_runner("tokens=3")}) as api:
        *pieces, last = await api.lines("m")
        assert [piece["content"] for piece in pieces] == ["t1 ", "t2 ", "t3 "]
        assert last["done"] is True
        assert 0 < last["seed"] < 2**53


async def test_a_client_of_http_1_0_gets_the_same_lines_without_a_frame() -> None:
    body = b'{"model": "m", "prompt": "p"}'
    async with serving({"m": fake_runner("tokens=2")}) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST /completion HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        with anyio.fail_after(LIMIT):
            head, _, lines = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"chunked" not in head.lower()
    assert [json.loads(line).get("content") for line in lines.splitlines()][:2] == ["t1 ", "t2 "]
    assert json.loads(lines.splitlines()[-1])["done"]


async def test_a_picture_comes_with_its_steps_and_the_seed_that_was_asked_for() -> None:
    async with serving({"m": fake_runner("steps=4; image=100000")}) as api:
        *steps, last = await api.lines("m", seed=7)
        assert [(line["step"], line["total"]) for line in steps] == [(step, 4) for step in range(5)]
        assert base64.b64decode(last["image"]) == picture(100_000)
        assert last["seed"] == 7


async def test_each_line_arrives_before_the_next_is_made() -> None:
    async with (
        Gate() as gate,
        serving({"m": fake_runner(f"tokens=2; gate@1={gate.path}")}) as api,
        api.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer,
    ):
        assert json.loads(await answer.content.readline()) == {"content": "t1 "}
        (await gate.arrival()).go()
        assert json.loads((await answer.read()).splitlines()[0]) == {"content": "t2 "}


async def test_all_fields_reach_the_runner(tmp_path: Path) -> None:
    record = tmp_path / "record"
    asked = {
        "prompt": "a heart",
        "negative_prompt": "blue",
        "guidance": 2.5,
        "width": 64,
        "height": 32,
        "steps": 2,
        "seed": 9,
        "images": [base64.b64encode(b"png").decode()],
        "options": {"top_k": 3, "stop": ["x"]},
    }
    async with serving({"m": fake_runner(f"record={record}")}) as api:
        await api.lines("m", **asked)
    request = next(line for line in record.read_text().splitlines() if line.startswith("request"))
    assert json.loads(request.split(" ", 2)[2]) == asked


async def test_a_failed_load_has_its_status_and_its_last_words() -> None:
    async with (
        serving({"m": fake_runner("stderr=no such weights; exit=3")}) as api,
        api.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer,
    ):
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["src"]) == (500, "load_failed", "runner")
        assert answer.headers["x-should-retry"] == "false"
        assert error["details"]["exit_code"] == 3
        assert error["details"]["last_words"] == ["no such weights"]


async def test_a_runner_that_refuses_keeps_its_status() -> None:
    async with serving({"m": fake_runner("status=400:width is odd")}) as api:
        status, code, message = await api.refusal("/completion", {"model": "m", "prompt": "p"})
        assert (status, code) == (400, "runner_error")
        assert "width is odd" in message


async def test_a_death_in_the_middle_is_the_last_line() -> None:
    async with serving({"m": fake_runner("tokens=5; stderr@2=GPU fell off; crash@2")}) as api:
        *pieces, last = await api.lines("m")
        assert [piece["content"] for piece in pieces] == ["t1 ", "t2 "]
        assert last["done"] is True
        assert last["error"]["code"] == "runner_died"
        assert last["error"]["status"] == 502
        assert last["error"]["details"]["signal"] == "SIGKILL"
        assert "GPU fell off" in last["error"]["details"]["last_words"]


async def test_an_end_without_done_is_an_error_line() -> None:
    async with serving({"m": fake_runner("tokens=1; done=no")}) as api:
        lines = await api.lines("m")
        assert lines[-1]["error"]["code"] == "bad_answer"
        assert lines[-1]["done"] is True


@pytest.mark.parametrize("phase", ["loading", "request", "1"])
async def test_a_client_that_leaves_ends_its_work(phase: str, tmp_path: Path) -> None:
    record = tmp_path / "record"
    async with (
        Gate() as gate,
        serving({"m": fake_runner(f"record={record}; tokens=9; gate@{phase}={gate.path}")}) as api,
    ):
        leaving = asyncio.create_task(_ask(api))
        arrival = await gate.arrival()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        if phase == "loading":  # the load is the supervisor's and goes on
            await until(lambda: api.sup.report("m").queue == 0)
            arrival.go()
            await until(lambda: api.sup.report("m").state == "ready")
            assert "request" not in record.read_text()
        else:
            with anyio.fail_after(LIMIT):
                await arrival.left()
        await until(lambda: api.sup.report("m").leases == 0)


@pytest.mark.parametrize(("told", "seconds"), [("30m", 1800), (90, 90), (-1, None)])
async def test_how_long_the_model_stays_is_the_requests_to_say(told: float | str, seconds: float | None) -> None:
    async with serving({"m": fake_runner("tokens=1", keep_alive="10m")}) as api:
        await api.lines("m", keep_alive=told)
        await api.lines("m", keep_alive=None)  # says nothing
        await until(lambda: api.sup.report("m").leases == 0)
        found = api.sup.report("m")
        assert found.last_used is not None
        stays = None if found.expires is None else found.expires - found.last_used
        assert stays == (seconds if seconds is None else pytest.approx(seconds, abs=1))
        await api.lines("m", keep_alive=0)
        await until(lambda: api.sup.report("m").state == "stopped")


async def test_how_long_it_stays_is_not_the_runners_concern(tmp_path: Path) -> None:
    record = tmp_path / "record"
    async with serving({"m": fake_runner(f"record={record}")}) as api:
        await api.lines("m", keep_alive="1h")
    assert "keep_alive" not in record.read_text()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("soon", 'keep_alive: expected a duration such as "5m"'),
        ("", 'keep_alive: expected a duration such as "5m"'),
        (True, "keep_alive: expected "),
        ([5], "keep_alive: expected "),
    ],
)
async def test_what_is_no_span_of_time_is_refused_by_its_name(told: object, words: str) -> None:
    async with serving({"m": fake_runner()}) as api:
        for path, body in (("/completion", {"prompt": "p"}), ("/models/load", {})):
            status, answer = await api.post(path, {"model": "m", "keep_alive": told, **body})
            error = answer["error"]
            assert (status, error["code"], error["param"]) == (400, "invalid_request", "keep_alive")
            assert error["message"].startswith(words)
        assert api.sup.report("m").state == "stopped"


@pytest.mark.parametrize("told", ["1", "1s", "1000ms"])
async def test_the_deadline_of_a_request(told: str) -> None:
    async with Gate() as gate, serving({"m": fake_runner(f"gate@request#1={gate.path}")}) as api:
        await api.sup.load("m")
        status, answer = await api.post("/completion", {"model": "m", "prompt": "p"}, **{"Mlxsup-Deadline": told})
        assert (status, answer["error"]["code"]) == (504, "deadline")
        assert answer["error"]["details"] == {"model": "m", "stage": "first_chunk", "limit": 1.0}
        with anyio.fail_after(LIMIT):
            await (await gate.arrival()).left()
        assert api.sup.report("m").leases == 0
        assert (await api.lines("m"))[-1]["done"] is True


async def test_a_deadline_that_passes_while_the_answer_comes_is_its_last_line() -> None:
    async with Gate() as gate, serving({"m": fake_runner(f"tokens=2; gate@1#1={gate.path}")}) as api:
        await api.sup.load("m")
        headers = {"mlxsup-deadline": "2s"}
        async with api.http.post("/completion", json={"model": "m", "prompt": "p"}, headers=headers) as answer:
            assert answer.status == 200
            first, last = (json.loads(line) for line in (await answer.read()).splitlines())
        assert first == {"content": "t1 "}
        assert (last["done"], last["error"]["code"], last["error"]["details"]["stage"]) == (True, "deadline", "answer")
        with anyio.fail_after(LIMIT):
            await (await gate.arrival()).left()
        await until(lambda: api.sup.report("m").leases == 0)


@pytest.mark.parametrize("told", ["soon", "", "0", "-1", "inf", "nan", "5 parsecs"])
@pytest.mark.parametrize(
    ("path", "fields"), [("/completion", {"prompt": "p"}), ("/models/load", {}), ("/models/unload", {})]
)
async def test_a_deadline_that_is_none_is_refused_by_its_name(told: str, path: str, fields: dict[str, str]) -> None:
    async with serving({"m": fake_runner()}) as api:
        status, answer = await api.post(path, {"model": "m", **fields}, **{"Mlxsup-Deadline": told})
        assert (status, answer["error"]["param"]) == (400, "mlxsup-deadline")
        assert answer["error"]["message"].startswith("mlxsup-deadline: ")
        assert api.sup.report("m").state == "stopped"


async def test_a_client_that_does_not_read_holds_up_nobody_and_its_leaving_ends_the_work(tmp_path: Path) -> None:
    record = tmp_path / "record"
    models = {"m": fake_runner(f"record={record}; tokens=300; {'; '.join(f'big@{n}=1' for n in range(1, 60))}")}
    async with serving({**models, "quick": fake_runner("tokens=1")}) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        body = b'{"model": "m", "prompt": "p"}'
        writer.write(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        with anyio.fail_after(LIMIT):
            await reader.readline()
            assert (await api.lines("quick"))[-1]["done"] is True
        assert api.sup.report("m").leases == 1
        assert "done" not in record.read_text()
        writer.transport.abort()
        await until(lambda: api.sup.report("m").leases == 0)
        writer.close()


async def _ask(api: Api) -> None:
    async with (
        aiohttp.ClientSession() as alone,
        alone.post(f"http://127.0.0.1:{api.port}/completion", json={"model": "m", "prompt": "p"}) as answer,
    ):
        await answer.read()
