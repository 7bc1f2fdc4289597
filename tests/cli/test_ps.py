"""`mlxsup ps` of a daemon whose runner takes more memory than it declared."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup.testing import Gate, fake_runner
from tests.daemon.children import Daemon, command, serving, write_config
from tests.waiting import LIMIT

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]
MIB = 1 << 20
SEEN = 2.0
BUSY_MACHINE = 1.0


async def _found(daemon: Daemon) -> dict[str, Any]:
    async with daemon.http.get("/runners") as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def test_memory_beyond_what_was_declared_is_in_the_list_within_two_seconds(tmp_path: Path) -> None:
    async with Gate() as gate:
        scenario = f"alloc@1=200; gate@2={gate.path}"
        config = write_config(tmp_path, {"greedy": fake_runner(scenario, aliases=["g"]), "late": fake_runner()})
        with config.open("a") as file:
            file.write(f'\n[devices]\ncpu = "{457 + 200}MiB"\n')
        async with serving(config) as daemon:
            at = ("--url", daemon.url)
            body = {"model": "greedy", "prompt": "p"}
            working = asyncio.create_task(_read(daemon, body))
            arrival = await gate.arrival("2")
            began = time.monotonic()
            with anyio.fail_after(LIMIT):
                while (found := await _found(daemon))["runners"][0]["memory"]["measured"] < 200 * MIB:
                    await anyio.sleep(0.02)
            assert time.monotonic() - began < SEEN + BUSY_MACHINE
            assert found["devices"][0]["reserved"] == found["runners"][0]["memory"]["measured"]
            assert "more than declared" in found["runners"][0]["note"]
            assert found["devices"][0]["note"].startswith("low on memory: no new loads until ")
            assert "where 64.0 MiB were reserved" in await daemon.child.says("greedy is ready: uses")
            await daemon.child.says("cpu lacks")
            waiting = asyncio.create_task(command("load", "late", *at, cwd=tmp_path))
            with anyio.fail_after(LIMIT):
                while (found := await _found(daemon))["runners"][1]["note"] != "waiting for memory":
                    await anyio.sleep(0.02)
            code, out, errors = await command("ps", *at, cwd=tmp_path)
            assert (code, errors) == (0, [])
            _, greedy, late, device = out.splitlines()
            assert "more than declared" in greedy
            assert "  waiting for memory  " in late
            assert device.startswith("cpu: low on memory: no new loads until ")
            code, out, _ = await command("ps", "--json", *at, cwd=tmp_path)
            assert json.loads(out)["devices"][0]["low"]
            assert (await command("explain", "g", *at, cwd=tmp_path))[1].startswith("queued: ")
            arrival.go()
            await working
            assert await waiting == (0, "", [])
            code, out, _ = await command("ps", *at, cwd=tmp_path)
            assert "  put out " in out.splitlines()[1]


async def _read(daemon: Daemon, body: dict[str, str]) -> bytes:
    async with daemon.http.post("/completion", json=body) as answer:
        return await answer.read()
