"""SIGHUP takes over the configuration as it is now, leaves alone what it does not change, and survives mistakes in it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from mlxsup import Supervisor
from mlxsup.config import Settings, parse
from mlxsup.daemon.reloading import reload_on_hangup
from mlxsup.engines import KEYS
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .children import alive, running, serving, write_config

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the daemon brings its own loop


async def test_models_come_go_and_change_while_others_work_on(tmp_path: Path) -> None:
    async with Gate() as gate:
        busy = fake_runner(f"tokens=2; gate@1={gate.path}")
        config = write_config(tmp_path, {"busy": busy, "changed": fake_runner(), "gone": fake_runner()})
        async with serving(config) as daemon:
            old = [await daemon.load("changed"), await daemon.load("gone")]
            async with daemon.http.post("/completion", json={"model": "busy", "prompt": "p"}) as answer:
                await answer.content.readline()
                arrival = await gate.arrival()
                write_config(
                    tmp_path, {"busy": busy, "changed": fake_runner("tokens=1"), "new": fake_runner("tokens=1")}
                )
                daemon.child.send(signal.SIGHUP)
                await daemon.child.says("taken over; models: 3")
                async with daemon.http.post("/completion", json={"model": "new", "prompt": "p"}) as first:
                    assert len((await first.read()).splitlines()) == 2
                async with daemon.http.post("/completion", json={"model": "gone", "prompt": "p"}) as refused:
                    assert refused.status == 404
                async with daemon.http.post("/completion", json={"model": "changed", "prompt": "p"}) as anew:
                    assert len((await anew.read()).splitlines()) == 2
                arrival.go()
                assert b'"done": true' in await answer.read()
            with anyio.fail_after(LIMIT):
                while any(alive(pid) for pid in old):
                    await anyio.sleep(0.01)


async def test_a_mistake_leaves_all_as_it_was(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config) as daemon:
        pid = await daemon.load("m")
        right = config.read_text()
        config.write_text(right.replace("engine", "engin"))
        daemon.child.send(signal.SIGHUP)
        assert "did you mean engine" in await daemon.child.says("stays as it was")
        async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
            assert answer.status == 200
            await answer.read()
        assert await daemon.pid_of("m") == pid
        config.write_text(right)
        daemon.child.send(signal.SIGHUP)
        await daemon.child.says("taken over; models: 1")
        assert await daemon.pid_of("m") == pid


@pytest.mark.parametrize(
    ("becomes", "why"),
    [("gone", "No such file"), ("empty", "is empty"), ("a pipe", "is no regular file"), ("long", "too many digits")],
)
async def test_a_file_that_is_none_any_more_leaves_all_as_it_was(tmp_path: Path, becomes: str, why: str) -> None:
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config) as daemon:
        pid = await daemon.load("m")
        right = config.read_text()
        config.unlink()
        if becomes == "a pipe":
            os.mkfifo(config)
        elif becomes != "gone":
            config.write_text("" if becomes == "empty" else "a = " + "1" * 5000)
        daemon.child.send(signal.SIGHUP)
        assert why in await daemon.child.says("stays as it was")
        assert await daemon.pid_of("m") == pid
        config.unlink(missing_ok=True)
        config.write_text(right)
        daemon.child.send(signal.SIGHUP)
        await daemon.child.says("taken over; models: 1")
        assert await daemon.pid_of("m") == pid


async def test_a_search_that_found_a_file_is_not_made_again(tmp_path: Path) -> None:
    """Else a file that is moved away would mean that the next one on the list, or none, is meant."""
    home = tmp_path / "mlxsup"
    home.mkdir()
    config = write_config(home, {"m": fake_runner()})
    env = {"XDG_CONFIG_HOME": str(tmp_path), "MLXSUP_CONFIG": ""}
    async with running("serve", "--listen", "127.0.0.1:0", cwd=tmp_path, env=env) as child:
        assert str(config) in await child.says("serves on")
        config.unlink()
        child.send(signal.SIGHUP)
        assert "No such file" in await child.says("stays as it was")


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_file_that_hangs_holds_up_neither_the_end_nor_more_than_one_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mlxsup.daemon")
    answers, reads, hung_up = threading.Event(), [0], asyncio.Event()
    settings = parse({}, KEYS)

    def read() -> Settings:
        reads[0] += 1
        answers.wait(LIMIT)
        return settings

    async with Supervisor(settings) as sup:
        reloading = asyncio.create_task(reload_on_hangup(sup, read, hung_up, limit=0.05))
        hung_up.set()
        await until(lambda: "has not ended within 0.05 s" in caplog.text)
        hung_up.set()
        await until(lambda: "hangs since an earlier SIGHUP" in caplog.text)
        assert reads == [1]
        answers.set()
        await until(lambda: _readers() == 0)
        await anyio.lowlevel.checkpoint()
        hung_up.set()
        await until(lambda: "is taken over; models: 1" in caplog.text)
        answers.clear()
        hung_up.set()
        await until(lambda: reads == [3])
        reloading.cancel()
        await asyncio.wait({reloading}, timeout=LIMIT / 2)
        assert reloading.cancelled()
        answers.set()
        await until(lambda: _readers() == 0)


@pytest.mark.loops("asyncio", "uvloop")
async def test_whatever_goes_wrong_the_next_one_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlxsup.daemon")
    hung_up, settings = asyncio.Event(), parse({}, KEYS)
    failures: list[Exception] = [KeyError("nobody expects this")]

    def read() -> Settings:
        if failures:
            raise failures.pop()
        return settings

    async with Supervisor(settings) as sup:
        reloading = asyncio.create_task(reload_on_hangup(sup, read, hung_up))
        hung_up.set()
        await until(lambda: "nobody expects this" in caplog.text)
        hung_up.set()
        await until(lambda: "is taken over; models: 1" in caplog.text)
        reloading.cancel()
        await asyncio.wait({reloading})


def _readers() -> int:
    return sum("read" in thread.name for thread in threading.enumerate() if thread.name.startswith("mlxsup"))


async def test_what_concerns_the_server_waits_for_a_restart(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config) as daemon:
        text = config.read_text()
        assert "[server]\n" in text
        config.write_text(text.replace("[server]\n", '[server]\nmax_body = "1MiB"\n'))
        daemon.child.send(signal.SIGHUP)
        await daemon.child.says("by a restart only")
        daemon.child.send(signal.SIGHUP)  # still not taken over, and told again
        with anyio.fail_after(LIMIT):
            while sum("by a restart only" in line for line in daemon.child.lines()) < 2:
                await anyio.sleep(0.01)
        async with daemon.http.get("/health") as health:
            assert health.status == 200
