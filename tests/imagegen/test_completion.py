"""What a client of the runner sees: pictures, steps, refusals."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import aiohttp
import anyio
import pytest
from PIL import Image, ImageStat

from mlxsup.imagegen.builtin.model import SIDE
from tests.imagegen.conftest import Child

pytestmark = pytest.mark.anyio


def picture(last: dict[str, Any]) -> Image.Image:
    """Decode the picture of an answer's last line."""
    with Image.open(io.BytesIO(base64.b64decode(last["image"]))) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


async def test_every_step_has_a_line_and_the_last_line_has_the_picture(runner: Child) -> None:
    *steps, last = await runner.complete(prompt="a red heart", width=64, height=64, steps=5, seed=7)
    assert steps == [{"step": step, "total": 5} for step in range(6)]
    assert picture(last).size == (64, 64)
    del last["image"]
    durations = {last.pop("eval_duration"), last.pop("prompt_eval_duration")}
    assert all(isinstance(duration, int) and duration > 0 for duration in durations)
    assert last == {
        "done": True,
        "seed": 7,
        "step": 5,
        "total": 5,
        "stop_reason": "stop",
        "eval_count": 5,
        "prompt_eval_count": 3,
    }


@pytest.mark.parametrize(("width", "height"), [(SIDE, SIDE), (256, SIDE), (SIDE + 8, 136), (None, None)])
async def test_the_picture_has_the_size_asked_for(runner: Child, width: int | None, height: int | None) -> None:
    lines = await runner.complete(prompt="sun", width=width, height=height, steps=1)
    assert picture(lines[-1]).size == (width or 256, height or 256)


async def test_a_picture_that_is_not_square_stands_in_the_middle_of_white(runner: Child) -> None:
    wide = picture((await runner.complete(prompt="a blue circle", width=128, height=64, steps=4, seed=1))[-1])
    square = picture((await runner.complete(prompt="a blue circle", width=64, height=64, steps=4, seed=1))[-1])
    assert wide.crop((32, 0, 96, 64)).tobytes() == square.tobytes()
    assert wide.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (255, 255, 255))]


async def test_a_red_heart_is_red(runner: Child) -> None:
    image = picture((await runner.complete(prompt="a red heart", seed=1))[-1])
    red, green, blue = ImageStat.Stat(image.crop((96, 96, 160, 160))).mean
    assert red > 180
    assert max(green, blue) < 100
    assert min(ImageStat.Stat(image.crop((0, 0, 16, 16))).mean) > 230


async def test_the_same_seed_gives_the_same_bytes(runner: Child) -> None:
    order = {"prompt": "a yellow star", "width": 64, "height": 64, "steps": 3}
    first, again, other = [(await runner.complete(**order, seed=seed))[-1] for seed in (11, 11, 12)]
    assert first["image"] == again["image"]
    assert first["image"] != other["image"]


@pytest.mark.parametrize("seed", [{}, {"seed": 0}])
async def test_a_seed_is_chosen_and_told_when_none_is_given(runner: Child, seed: dict[str, int]) -> None:
    order = {"prompt": "moon", "width": SIDE, "height": SIDE, "steps": 2}
    first = (await runner.complete(**order, **seed))[-1]
    assert 0 < first["seed"] < 2**53
    again = (await runner.complete(**order, seed=first["seed"]))[-1]
    assert again["image"] == first["image"]


async def test_guidance_changes_the_picture(runner: Child) -> None:
    order = {"prompt": "a fox", "width": SIDE, "height": SIDE, "steps": 2, "seed": 5}
    plain, guided = [(await runner.complete(**order, guidance=guidance))[-1] for guidance in (1, 3)]
    assert plain["image"] != guided["image"]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"width": 250}, "invalid_request", ["width", "248", "256"]),
        ({"height": SIDE + 1}, "invalid_request", ["height", f"{SIDE}", f"{SIDE + 8}"]),
        ({"width": SIDE - 8}, "invalid_request", ["width", f"{SIDE}", "4096"]),
        ({"height": 4104}, "invalid_request", ["height", "4096"]),
        ({"width": "64"}, "invalid_request", ["width"]),
        ({"width": -64}, "invalid_request", ["width"]),
        ({"steps": 0}, "invalid_request", ["steps", "200"]),
        ({"steps": 201}, "invalid_request", ["steps", "200"]),
        ({"steps": 1.5}, "invalid_request", ["steps"]),
        ({"seed": -1}, "invalid_request", ["seed"]),
        ({"seed": 2**53}, "invalid_request", ["seed"]),
        ({"guidance": -1}, "invalid_request", ["guidance"]),
        ({"guidance": 1e300}, "invalid_request", ["guidance"]),
        ({"prompt": None}, "invalid_request", ["prompt"]),
        ({"widht": 64}, "invalid_request", ["widht"]),
        ({"options": {"top": 1}}, "invalid_request", ["top"]),
        ({"images": ["not base64!"]}, "invalid_request", ["images"]),
        ({"strength": 1.1, "images": [""]}, "invalid_request", ["strength", "0 to 1"]),
        ({"previews": -1}, "invalid_request", ["previews", "0 to 100"]),
        ({"previews": 101}, "invalid_request", ["previews", "0 to 100"]),
        ({"output_format": "gif"}, "invalid_request", ["output_format"]),
        ({"output_format": "webp", "output_compression": 101}, "invalid_request", ["output_compression", "0 to 100"]),
        ({"output_compression": 50}, "invalid_request", ["output_compression", "png"]),
        ({"output_format": "png", "output_compression": 100}, "invalid_request", ["output_compression", "png"]),
        ({"strength": 0.5}, "invalid_request", ["strength", "images"]),
        ({"strength": 0.5, "images": []}, "invalid_request", ["strength", "images"]),
        ({"images": ["aGVsbG8="]}, "invalid_request", ["images[0]", "JPEG, PNG or WebP"]),
        ({"images": ["aGVsbG8=", "aGVsbG8="]}, "invalid_request", ["images", "one picture", "not 2"]),
        ({"negative_prompt": "blurry"}, "unsupported_parameter", ["negative_prompt"]),
        ({"options": {"num_predict": 5}}, "unsupported_parameter", ["num_predict"]),
        ({"options": {"temperature": 0}}, "unsupported_parameter", ["temperature"]),
        ({"options": {"stop": ["x"]}}, "unsupported_parameter", ["stop"]),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    runner: Child, fields: dict[str, object], code: str, words: list[str]
) -> None:
    status, given, message = await runner.refusal(json.dumps({"prompt": "x", **fields}).encode())
    assert (status, given) == (400, code)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"prompt":"\xff"}', b'{"prompt":"x"}{}'])
async def test_a_body_that_is_no_request_is_refused(runner: Child, body: bytes) -> None:
    status, code, _ = await runner.refusal(body)
    assert (status, code) == (400, "invalid_request")


async def test_what_changes_nothing_is_accepted(runner: Child) -> None:
    lines = await runner.complete(
        prompt="",
        negative_prompt="",
        images=[],
        options={},
        guidance=None,
        strength=None,
        previews=0,
        width=SIDE,
        height=SIDE,
        steps=1,
    )
    assert lines[-1]["done"]


async def test_other_paths_and_methods_are_told_so(runner: Child) -> None:
    async with runner.session() as session:
        for method, path, status in (("GET", "/", 404), ("GET", "/completion", 405), ("POST", "/health", 405)):
            async with session.request(method, path) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["message"]


async def test_health_is_answered_while_a_large_picture_is_being_made(runner: Child) -> None:
    order = {"prompt": "x", "width": 2048, "height": 2048, "steps": 5}
    async with runner.session() as session, session.post("/completion", json=order) as answer:
        await answer.content.readline()
        times: list[float] = []
        async with anyio.create_task_group() as tasks:
            ended = anyio.Event()

            async def read_on() -> None:
                await answer.read()
                ended.set()

            tasks.start_soon(read_on)
            while not ended.is_set():
                began = anyio.current_time()
                status, health = await runner.health()
                times.append(anyio.current_time() - began)
                assert status == 200
                assert health["memory"]["active"] > 1 << 20
    assert len(times) > 1
    assert max(times) < 1


async def test_work_stops_when_its_caller_leaves(start: Any) -> None:
    child = start()
    async with child.session() as session, session.post("/completion", json={"prompt": "x", "steps": 200}) as answer:
        await answer.content.readline()
        assert (await child.health())[1]["busy"]
    line = await anyio.to_thread.run_sync(child.line_with, "given up")
    assert line
    assert (await child.complete(prompt="a sun", width=SIDE, height=SIDE, steps=1))[-1]["done"]
    assert not (await child.health())[1]["busy"]


async def test_unknown_words_are_noted_and_ignored(start: Any) -> None:
    child = start()
    order = {"width": SIDE, "height": SIDE, "steps": 2, "seed": 3, "metadata": False}
    noted = (await child.complete(prompt="a Red HEART zyzzy, qwop!", **order))[-1]
    plain = (await child.complete(prompt="red heart", **order))[-1]
    assert noted["image"] == plain["image"]
    assert child.line_with("unknown words") == "unknown words: zyzzy qwop"


async def test_a_body_over_the_limit_is_refused(runner: Child) -> None:
    body = io.BytesIO(b'{"prompt":"' + b"x" * (129 << 20) + b'"}')
    try:
        status, code, _ = await runner.refusal(body)
    except aiohttp.ClientOSError:
        return  # it may close the connection on a client that is still sending
    assert (status, code) == (413, "body_too_large")
