"""Pictures of the work in progress: as many as asked for, never in the way of steps or of the result."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

from mlxsup import CompletionRequest, Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.imagegen.lines import WAITING_PREVIEWS, Line, Lines
from mlxsup.imagegen.pipelines.base import PREVIEW_SIDE, OnStep, Order
from mlxsup.imagegen.previews import preview_size, preview_steps
from mlxsup.protocol import CompletionChunk
from tests.imagegen.conftest import Child
from tests.imagegen.test_service import Gated, lines_of, serving

pytestmark = pytest.mark.anyio


def opened(image: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(image))) as found:
        found.load()
        return found


def distance(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).rms)


class TestSteps:
    @given(st.integers(0, 100), st.integers(0, 200), st.integers(0, 200))
    def test_they_are_spread_between_first_and_last(self, wanted: int, first: int, more: int) -> None:
        total = first + more
        steps = sorted(preview_steps(wanted, first, total))
        assert len(steps) == max(0, min(wanted, more - 1))
        assert all(first < step < total for step in steps)
        gaps = [after - before for before, after in zip([first, *steps], [*steps, total], strict=True)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1 or not steps

    def test_examples(self) -> None:
        assert sorted(preview_steps(3, 0, 8)) == [2, 4, 6]
        assert sorted(preview_steps(1, 4, 8)) == [6]
        assert preview_steps(5, 0, 1) == frozenset()

    @given(st.integers(1, 5000), st.integers(1, 5000))
    def test_their_size_is_bounded_and_of_the_same_shape(self, width: int, height: int) -> None:
        found = preview_size(width, height)
        assert max(found) == min(PREVIEW_SIDE, max(width, height))
        assert min(found) >= 1
        assert abs(min(found) - min(width, height) * max(found) / max(width, height)) <= 1


class TestLines:
    async def test_a_slow_reader_misses_old_previews_and_nothing_else(self) -> None:
        lines, sent = Lines(), list[Line]()
        size = WAITING_PREVIEWS // 4
        for step in range(1, 11):
            sent.append(Line(b"step %d" % step))
            sent.append(Line(bytes(size), preview=True))
        sent.append(Line(b"done", last=True))
        for line in sent:
            lines.put(line)
        expected = [line for line in sent if not line.preview or sent.index(line) > 20 - 8]
        assert [await lines.get() for _ in expected] == expected
        with anyio.move_on_after(0) as late:
            await lines.get()
        assert late.cancelled_caught

    async def test_a_single_preview_is_never_too_large(self) -> None:
        lines = Lines()
        for step in range(3):
            lines.put(Line(bytes(2 * WAITING_PREVIEWS) + bytes([step]), preview=True))
        assert (await lines.get()).data.endswith(b"\2")

    async def test_a_reader_that_waits_gets_each_line(self) -> None:
        lines, found = Lines(), list[Line]()

        async def read() -> None:
            while not found or not found[-1].last:
                found.append(await lines.get())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for number in range(5):
                await anyio.lowlevel.checkpoint()
                lines.put(Line.of(CompletionChunk(step=number, total=5)))
            lines.put(Line.of(CompletionChunk(done=True)))
        assert len(found) == 6


class TestRunner:
    @pytest.mark.parametrize(("kind", "format_"), [(None, "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
    async def test_each_comes_behind_its_step_in_the_format_asked_for(
        self, runner: Child, kind: str | None, format_: str
    ) -> None:
        *lines, last = await runner.complete(prompt="a red heart", steps=8, seed=1, previews=3, output_format=kind)
        previews = [line for line in lines if line.get("preview")]
        assert [line for line in lines if line not in previews] == [{"step": step, "total": 8} for step in range(9)]
        assert [set(line) for line in previews] == [{"step", "total", "image", "preview"}] * 3
        assert [(line["step"], line["total"]) for line in previews] == [(2, 8), (4, 8), (6, 8)]
        for line in previews:
            assert lines[lines.index(line) - 1] == {"step": line["step"], "total": 8}
            assert (opened(line["image"]).format, opened(line["image"]).size) == (format_, (256, 256))
        assert "preview" not in last

    async def test_they_look_ahead_to_the_picture(self, runner: Child) -> None:
        """Half-way, what the model foresees is far nearer to the result than to noise."""
        *lines, last = await runner.complete(prompt="a red heart", steps=8, seed=1, previews=7)
        result = opened(last["image"])
        distances = [distance(opened(line["image"]), result) for line in lines if "image" in line]
        assert len(distances) == 7
        assert distances[-1] < distances[0]
        assert max(distances[3:]) < 60

    async def test_they_change_nothing_about_the_picture(self, runner: Child) -> None:
        order = {"prompt": "sun", "steps": 4, "seed": 3, "guidance": 2}
        with_some, without = [(await runner.complete(**order, previews=count))[-1] for count in (3, 0)]
        assert with_some["image"] == without["image"]

    @pytest.mark.parametrize(("steps", "count"), [(1, 0), (2, 1), (4, 3)])
    async def test_there_are_no_more_than_there_are_steps_before_the_last(
        self, runner: Child, steps: int, count: int
    ) -> None:
        lines = await runner.complete(prompt="sun", steps=steps, previews=100)
        assert [line["step"] for line in lines if line.get("preview")] == list(range(1, count + 1))

    async def test_a_large_picture_has_small_previews(self, runner: Child) -> None:
        lines = await runner.complete(prompt="sun", width=2048, height=1024, steps=2, previews=1, output_format="jpeg")
        assert [opened(line["image"]).size for line in lines if "image" in line] == [(512, 256), (2048, 1024)]


class TestSupervised:
    """Through a supervisor and a runner of its own."""

    @pytest.fixture
    def sup(self) -> Supervisor:
        return Supervisor(parse({"models": {"emoji": {"engine": "imagegen", "path": "builtin:emoji"}}}, KEYS))

    async def test_library_callers_get_them(self, sup: Supervisor) -> None:
        async with sup, sup.completion("emoji", prompt="a red heart", steps=6, previews=2) as completion:
            chunks = [chunk async for chunk in completion]
        previews = [chunk for chunk in chunks if chunk.preview]
        assert [(chunk.step, chunk.total, chunk.done) for chunk in previews] == [(2, 6, False), (4, 6, False)]
        pictures = [Image.open(io.BytesIO(chunk.image_bytes())) for chunk in chunks if chunk.image]
        assert [picture.size for picture in pictures] == [(256, 256)] * 3
        assert chunks[-1].done
        assert not chunks[-1].preview

    async def test_those_who_pass_the_bytes_on_get_them(self, sup: Supervisor) -> None:
        request = CompletionRequest(prompt="sun", steps=4, previews=3, seed=2)
        body = b""
        async with sup, sup.completion("emoji", request) as completion:
            while block := await completion.next_bytes():
                body += block
        lines = [json.loads(line) for line in body.splitlines()]
        assert [line["step"] for line in lines if line.get("preview")] == [1, 2, 3]
        assert opened(lines[-1]["image"]).size == (256, 256)


class Noisy(Gated):
    """Previews that cannot be compressed; those of odd steps fail if the prompt says so."""

    default_steps = 16
    honours = frozenset({"previews"})

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        assert order.images == ()
        for step in range(order.steps + 1):
            on_step(step, order.steps, lambda step=step: self._preview(order, step))  # type: ignore[misc]
        self.begun.append("done")
        return Image.new("RGB", (order.width, order.height))

    def _preview(self, order: Order, step: int) -> Image.Image:
        if order.prompt == "fail" and step % 2:
            raise MemoryError("no room\nfor it")
        return Image.frombytes("RGB", (600, 600), random.Random(step).randbytes(600 * 600 * 3))


class TestPipelines:
    async def test_one_that_has_none_refuses_them(self, tmp_path: Path) -> None:
        async with serving(Gated(), tmp_path) as runner:
            order = {"prompt": "x", "previews": 1}
            async with runner.session.post("/completion", json=order) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "unsupported_parameter")

    async def test_none_are_none(self, tmp_path: Path) -> None:
        pipeline = Gated()
        pipeline.gate.set()
        order = {"prompt": "x", "previews": 0}
        async with serving(pipeline, tmp_path) as runner, runner.session.post("/completion", json=order) as answer:
            assert (await lines_of(answer))[-1]["done"]

    async def test_one_that_fails_is_logged_and_the_work_goes_on(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        order = {"prompt": "fail", "previews": 3, "steps": 4}
        async with serving(Noisy(), tmp_path) as runner, runner.session.post("/completion", json=order) as answer:
            lines = await lines_of(answer)
        assert [line["step"] for line in lines if line.get("preview")] == [2]
        assert [line["step"] for line in lines if not line.get("preview")] == [0, 1, 2, 3, 4, 4]
        assert "a preview failed: MemoryError: no room for it" in caplog.text

    async def test_a_reader_who_is_too_slow_misses_some_of_them_alone(self, tmp_path: Path) -> None:
        pipeline, order = Noisy(), {"prompt": "x", "previews": 15}
        async with serving(pipeline, tmp_path) as runner, runner.session.post("/completion", json=order) as answer:
            while not pipeline.begun:  # nothing is read before all is made
                await asyncio.sleep(0.01)
            lines = await lines_of(answer)
        steps: list[dict[str, Any]] = [line for line in lines if not line.get("preview")]
        assert [line["step"] for line in steps] == [*range(17), 16]
        previews = [line for line in lines if line.get("preview")]
        assert 0 < len(previews) < 15
        assert previews[-1]["step"] == 15
        assert {opened(line["image"]).size for line in previews} == {(512, 512)}

    async def test_a_sign_of_life_is_the_last_step_and_no_picture(self, tmp_path: Path) -> None:
        pipeline = GatedWithPreview()
        async with (
            serving(pipeline, tmp_path, heartbeat=0.02) as runner,
            runner.session.post("/completion", json={"prompt": "x", "previews": 1}) as answer,
        ):
            said = [json.loads(await answer.content.readline()) for _ in range(8)]
            pipeline.gate.set()
        assert [line for line in said if line.get("preview")] == [said[2]]
        assert said[3:] == [{"step": 1, "total": 2}] * 5


class GatedWithPreview(Gated):
    honours = frozenset({"previews"})

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        picture = Image.new("RGB", (order.width, order.height))
        on_step(0, 2)
        on_step(1, 2, lambda: picture)
        self.gate.wait(10)
        return picture
