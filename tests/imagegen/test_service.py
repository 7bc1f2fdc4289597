"""Queue, heartbeat and failures, with a pipeline that a test holds at a gate."""

from __future__ import annotations

import base64
import json
import os
import socket as sockets
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from PIL import Image

from mlxsup.imagegen.pipelines.base import OnStep, Order, Progress, Sizes
from mlxsup.imagegen.service import Service
from mlxsup.imagegen.worker import QUEUE, Worker
from mlxsup.metadata import read_settings
from tests.imagegen.conftest import PATIENCE

pytestmark = pytest.mark.anyio


class PanicException(BaseException):
    """No Exception, as their panics are none."""


class Gated:
    """A pipeline that waits at `gate` after its first step, and fails or panics if the prompt says so."""

    sizes = Sizes(smallest=32, multiple=8, default=32)
    default_steps = 2
    default_guidance = 1.0
    honours: frozenset[str] = frozenset()
    most_images = 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[str] = []

    def load(self, progress: Progress) -> Gated:
        progress(1.0)
        return self

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        self.begun.append(order.prompt)
        on_step(0, order.steps)
        on_step(1, order.steps)
        assert self.gate.wait(PATIENCE)
        if order.prompt == "fail":
            raise RuntimeError("out of\nluck")
        if order.prompt == "panic":
            raise PanicException("called `Option::unwrap()` on a `None` value")
        on_step(2, order.steps)
        return Image.new("RGB", (order.width, order.height))


@dataclass
class Serving:
    service: Service
    session: aiohttp.ClientSession

    def completion(self, prompt: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.session.post("/completion", json={"prompt": prompt})


@asynccontextmanager
async def serving(
    pipeline: Gated, tmp_path: Path, heartbeat: float = 10.0, model: str = "gated", max_pixels: int | None = None
) -> AsyncIterator[Serving]:
    path = str(tmp_path / "s")
    listener = sockets.socket(sockets.AF_UNIX)
    listener.bind(path)
    listener.listen()
    ready, write_end = os.pipe()
    service = Service(
        pipeline.load, model=model, max_pixels=max_pixels, listener=listener, heartbeat=heartbeat, ready_fd=write_end
    )
    connector = aiohttp.UnixConnector(path, limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.serve)
        assert await anyio.to_thread.run_sync(os.read, ready, 1)
        os.close(ready)
        async with aiohttp.ClientSession("http://runner", connector=connector, timeout=timeout) as session:
            yield Serving(service, session)
        pipeline.gate.set()
        service.end()


async def lines_of(answer: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await answer.read()).splitlines()]


async def test_only_so_many_wait_and_one_who_leaves_makes_room(tmp_path: Path) -> None:
    pipeline = Gated()
    async with serving(pipeline, tmp_path) as runner, AsyncExitStack() as callers:
        answers: list[aiohttp.ClientResponse] = []
        for number in range(1 + QUEUE):
            answer = await callers.enter_async_context(runner.completion(str(number)))
            assert json.loads(await answer.content.readline()) == {"step": 0, "total": 2}
            if number == 0:  # in work, so that all others wait
                assert json.loads(await answer.content.readline()) == {"step": 1, "total": 2}
            answers.append(answer)
        async with runner.completion("late") as refused:
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "queue_full"
        answers.pop(3).close()
        accepted = await callers.enter_async_context(runner.completion("again"))
        with anyio.fail_after(PATIENCE):
            while accepted.status == 503:  # until the one who left has been noticed
                accepted = await callers.enter_async_context(runner.completion("again"))
        answers.append(accepted)
        pipeline.gate.set()
        assert all([(await lines_of(answer))[-1]["done"] for answer in answers])
    assert pipeline.begun == ["0", "1", "2", "4", "5", "6", "7", "8", "again"]


async def test_the_last_step_is_said_again_when_nothing_else_happens(tmp_path: Path) -> None:
    pipeline = Gated()
    async with serving(pipeline, tmp_path, heartbeat=0.02) as runner, runner.completion("x") as answer:
        said = [json.loads(await answer.content.readline()) for _ in range(8)]
        assert said[-4:] == [{"step": 1, "total": 2}] * 4
        pipeline.gate.set()
        last = (await lines_of(answer))[-1]
    assert (last["done"], last["step"]) == (True, 2)


async def test_a_picture_that_fails_ends_in_one_error_line_and_the_next_one_works(tmp_path: Path) -> None:
    pipeline = Gated()
    pipeline.gate.set()
    async with serving(pipeline, tmp_path) as runner:
        async with runner.completion("fail") as answer:
            assert (await lines_of(answer))[-1] == {"content": "error: out of luck", "done": True}
        async with runner.completion("x") as answer:
            assert "image" in (await lines_of(answer))[-1]


async def test_a_panic_fails_its_picture_and_the_next_one_works(tmp_path: Path) -> None:
    pipeline = Gated()
    pipeline.gate.set()
    async with serving(pipeline, tmp_path) as runner:
        async with runner.completion("panic") as answer:
            last = (await lines_of(answer))[-1]
        async with runner.completion("x") as answer:
            assert "image" in (await lines_of(answer))[-1]
    assert last == {"content": "error: called `Option::unwrap()` on a `None` value", "done": True}


async def test_a_panic_while_loading_is_told_and_ends_it(tmp_path: Path) -> None:
    def load(progress: Progress) -> Gated:
        raise PanicException("no such\nvocabulary")

    with sockets.socket(sockets.AF_UNIX) as listener, anyio.fail_after(PATIENCE):
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        told = await Service(load, model="m", listener=listener).serve()
    assert told == "the model cannot be loaded: no such vocabulary"


async def test_a_thread_that_breaks_ends_the_runner_and_tells_its_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, nothing would ever be made again, and the runner would still look well."""

    def broken(_: Worker) -> None:
        raise PanicException("twice")

    pipeline = Gated()
    async with serving(pipeline, tmp_path) as runner, AsyncExitStack() as callers:
        answers = [await callers.enter_async_context(runner.completion("x")) for _ in range(2)]
        assert [json.loads(await answers[0].content.readline())["step"] for _ in range(2)] == [0, 1]
        monkeypatch.setattr(Worker, "_note_memory", broken)
        pipeline.gate.set()
        said = [(await lines_of(answer))[-1]["content"] for answer in answers]
    assert said == ["error: twice", "error: the thread that makes pictures broke: PanicException: twice"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin:emoji", "builtin:emoji"),
        ("/models/flux dev/", "flux dev"),
        ("org/name", "name"),
        ("/hub/models--org--name/snapshots/0123abc", "name"),
        ("/hub/models--org--name", "name"),
        ("/hub/models--name/snapshots/0123abc/", "name"),
        ("snapshots/0123abc", "snapshots/0123abc"),
        (".", "."),
    ],
)
async def test_a_picture_tells_what_its_model_is_called(tmp_path: Path, model: str, name: str) -> None:
    pipeline = Gated()
    pipeline.gate.set()
    async with serving(pipeline, tmp_path, model=model) as runner, runner.completion("x") as answer:
        picture = base64.b64decode((await lines_of(answer))[-1]["image"])
    await anyio.Path(tmp_path / "picture").write_bytes(picture)
    said = await anyio.to_thread.run_sync(read_settings, tmp_path / "picture")
    assert (said or {})["model"] == name


async def test_all_callers_are_told_when_the_runner_ends(tmp_path: Path) -> None:
    pipeline = Gated()
    async with serving(pipeline, tmp_path) as runner, AsyncExitStack() as callers:
        answers = [await callers.enter_async_context(runner.completion("x")) for _ in range(3)]
        assert [json.loads(await answers[0].content.readline())["step"] for _ in range(2)] == [0, 1]
        runner.service.end()
        last_lines = [(await lines_of(answer))[-1] for answer in answers]
    assert last_lines == [{"content": "error: the runner is ending", "done": True}] * 3
    assert pipeline.begun == ["x"]
