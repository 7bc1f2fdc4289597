"""SIGHUP takes over the configuration as it is now, leaves alone what it does not change, and survives mistakes in it."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT

from .children import alive, serving, write_config

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the daemon brings its own loop


async def test_models_come_go_and_change_while_others_work_on(tmp_path: Path) -> None:
    async with Gate() as gate:
        busy = fake_runner(f"tokens=2; gate@1={gate.path}")
        config = write_config(tmp_path, {"busy": busy, "changed": fake_runner(), "gone": fake_runner()})
        async with serving(config) as daemon:
            for name in ("changed", "gone"):
                async with daemon.http.post("/models/load", json={"model": name}) as answer:
                    assert answer.status == 200
            old = [await daemon.pid_of("changed"), await daemon.pid_of("gone")]
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
        async with daemon.http.post("/models/load", json={"model": "m"}) as answer:
            assert answer.status == 200
        pid = await daemon.pid_of("m")
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


async def test_what_concerns_the_server_waits_for_a_restart(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config) as daemon:
        text = config.read_text()
        assert "[server]\n" in text
        config.write_text(text.replace("[server]\n", '[server]\nmax_body = "1MiB"\n'))
        daemon.child.send(signal.SIGHUP)
        await daemon.child.says("by a restart only")
        async with daemon.http.get("/health") as health:
            assert health.status == 200
