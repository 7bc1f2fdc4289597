"""A path that hangs, as on a file server that is gone, keeps nobody from anything but its own model."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.config import Settings, parse
from mlxsup.engines import KEYS
from mlxsup.errors import EngineUnavailable, LoadFailed, LoadTimeout, ResourceExhausted, Unloaded
from mlxsup.machine import Machine
from mlxsup.testing import fake_runner
from tests import waiting

from .weights.making import safetensors

pytestmark = pytest.mark.anyio
LIMIT = 15.0
until = functools.partial(waiting.until, limit=LIMIT)
WEIGHTS = safetensors({"w": ("F32", [10])})


class Server:
    """A folder that hangs when it is entered or a file of it is opened, until it is back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.back = threading.Event()
        self.opened = 0
        self._open = os.open
        self._access = os.access

    def open(self, path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).startswith(str(self.folder)):
            self.opened += 1
            self.back.wait(60)
        return self._open(path, *arguments, **more)

    def access(self, path: Any, *arguments: Any, **more: Any) -> bool:
        if str(path).startswith(str(self.folder)):
            self.opened += 1
            self.back.wait(60)
        return self._access(path, *arguments, **more)

    def model(self, name: str = "m", **keys: Any) -> dict[str, Any]:
        """A model whose files are here."""
        path = self.folder / f"{name}.safetensors"
        path.write_bytes(WEIGHTS)
        entry = fake_runner(path=str(path), **keys)
        del entry["memory"]
        return entry


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", server.open)
        patch.setattr(os, "access", server.access)
        yield server
        server.back.set()
        for thread in readers():
            thread.join(LIMIT)


def configured(**models: dict[str, Any]) -> Settings:
    return parse({"devices": {"cpu": "4GiB"}, "models": models}, KEYS)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlxsup weighing")]


async def test_a_dozen_of_them_keep_nobody_else_from_anything(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsup.registry.EXPLAIN_WAIT", 0.05)
    dead = {f"dead{number}": server.model(f"dead{number}") for number in range(12)}  # more than a loop has threads
    async with Supervisor(configured(good=fake_runner(), **dead)) as sup:
        loads = [asyncio.create_task(sup.load(name)) for name in dead]
        await until(lambda: server.opened == len(dead))
        with anyio.fail_after(LIMIT):
            await sup.load("good")
        await until(lambda: sup.report("good").memory.measured)
        report = sup.report("dead0")
        assert (report.state, report.queue, report.note) == ("stopped", 1, "reading its files")
        assert report.reason == "its files are being read, for how much memory it needs"
        assert not report.waits_for_memory
        assert f"queued: dead0: what it needs is not known, as reading {server.folder}" in await sup.explain("dead0")
        with anyio.fail_after(LIMIT):
            assert (await sup.explain("good")).startswith("granted at once")
            await sup.unload("dead0")
        with pytest.raises(Unloaded):
            await loads[0]
        began = time.monotonic()
    assert time.monotonic() - began < LIMIT
    assert len(readers()) == len(dead), "it has waited for them"
    await asyncio.wait(loads)


async def test_a_load_fails_in_time_and_the_next_at_once_until_the_server_is_back(server: Server) -> None:
    async with Supervisor(configured(m=server.model(load_timeout="1.5s"))) as sup:
        with pytest.raises(LoadTimeout, match=r"reading .* has hung for 1\.5 s") as caught:
            await sup.load("m")
        assert caught.value.details["stage"] == "weighing"
        assert caught.value.details["path"] == str(server.folder / "m.safetensors")
        assert caught.value.retry_after
        assert sup.report("m").state == "failed"
        for _ in range(5):
            with pytest.raises(LoadTimeout):
                await sup.load("m")
        assert "refused: m: what it needs" in await sup.explain("m")
        assert (server.opened, len(readers())) == (1, 1)
        server.back.set()
        await until(lambda: not readers())
        await sup.load("m")
        assert server.opened > 1


async def test_a_folder_to_start_in_that_hangs_is_found_before_a_child_hangs_in_it(server: Server) -> None:
    """The loop waits for a child until it has entered its folder."""
    stuck = fake_runner(cwd=str(server.folder), load_timeout="1.5s")
    async with Supervisor(configured(m=stuck, good=fake_runner())) as sup:
        load = asyncio.create_task(sup.load("m"))
        await until(lambda: server.opened)
        with anyio.fail_after(LIMIT):
            await sup.load("good")
        with pytest.raises(LoadTimeout, match=r"reading .* has hung for 1\.5 s") as caught:
            await load
        assert caught.value.details["path"] == str(server.folder)
        server.back.set()
        await until(lambda: not readers())
        await sup.load("m")


@pytest.mark.parametrize(("cwd", "why"), [("/none/such", "no such folder"), ("/no\0ne", "null byte|no such folder")])
async def test_a_folder_that_cannot_be_is_refused_in_words(cwd: str, why: str) -> None:
    async with Supervisor(configured(m=fake_runner(cwd=cwd))) as sup:
        with pytest.raises(EngineUnavailable, match=why):
            await sup.load("m")


async def test_who_comes_and_goes_leaves_nothing_behind(server: Server) -> None:
    async with Supervisor(configured(m=server.model())) as sup:
        for _ in range(20):
            load = asyncio.create_task(sup.load("m"))
            await until(lambda: sup.report("m").queue)
            load.cancel()
            await asyncio.wait({load})
        load = asyncio.create_task(sup.load("m"))
        await until(lambda: sum(task.get_name() == "mlxsup weighing m" for task in asyncio.all_tasks()) == 1)
        assert (server.opened, len(readers())) == (1, 1)
        server.back.set()
        with anyio.fail_after(LIMIT):
            await load


async def test_another_path_is_tried_though_the_first_still_hangs(server: Server) -> None:
    async with Supervisor(configured(m=server.model())) as sup:
        load = asyncio.create_task(sup.load("m"))
        await until(lambda: server.opened)
        await sup.reload(configured(m=fake_runner()))
        with anyio.fail_after(LIMIT):
            await load
        assert len(readers()) == 1


async def test_two_who_ask_at_once_have_each_an_error_of_their_own(tmp_path: Path) -> None:
    entry = fake_runner(path=str(tmp_path / "none.safetensors"))
    del entry["memory"]
    async with Supervisor(configured(m=entry)) as sup:
        load = asyncio.create_task(sup.load("m"))
        explained = await sup.explain("m")
        with pytest.raises(LoadFailed, match=r"none\.safetensors: .*; or say what it needs: models\.m\.memory"):
            await load
        assert explained.startswith("refused: ")


async def test_what_nobody_expected_is_told_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def weigh(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Machine, "weigh", weigh)
    async with Supervisor(configured(m=fake_runner())) as sup:
        with pytest.raises(LoadFailed, match="unexpected failure: ZeroDivisionError"):
            await sup.load("m")
        assert "a bug" in await sup.explain("m")
    assert "unexpected failure while weighing m" in caplog.text


async def test_without_threads_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("mlxsup weighing"):
            raise RuntimeError("can't start new thread")
        real(thread)

    real = threading.Thread.start
    async with Supervisor(configured(m=fake_runner())) as sup:
        with monkeypatch.context() as none:
            none.setattr(threading.Thread, "start", start)
            with pytest.raises(ResourceExhausted, match="can't start new thread"):
                await sup.load("m")
        await sup.load("m")


def test_an_answer_after_the_loop_has_ended_is_nobodys(server: Server) -> None:
    async def leave() -> None:
        async with Supervisor(configured(m=server.model())) as sup:
            load = asyncio.create_task(sup.load("m"))
            await until(lambda: server.opened)
        await asyncio.wait({load})

    asyncio.run(leave())
    (reader,) = readers()
    server.back.set()
    reader.join(LIMIT)
    assert not reader.is_alive()
