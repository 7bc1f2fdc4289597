"""The daemon where the machine runs short: of descriptors, of disk, of somebody who reads its log; and among clients that dawdle."""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import os
import resource
import signal
import socket
import sys
import termios
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import anyio
import psutil
import pytest

from mlxsup.testing import fake_runner
from tests.waiting import LIMIT, until

from .children import Daemon, alive, serving, write_config

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the daemon brings its own loop
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="a limit of a process that runs; in-process tests do the same"
)


async def ask(daemon: Daemon) -> float:
    began = time.monotonic()
    async with daemon.http.get("/health") as answer:
        assert answer.status == 200
    return time.monotonic() - began


async def test_five_hundred_half_open_requests_change_nothing_and_are_left(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()}, header_timeout="3s")
    async with serving(config) as daemon:
        await ask(daemon)
        process = psutil.Process(daemon.child.pid)
        before = process.num_fds()
        port = int(daemon.url.rpartition(":")[2])
        with ExitStack() as opened:
            for _ in range(400):
                line = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
                line.sendall(b"POST /completion HTTP/1.1\r\nHost: localhost\r\n")
            for _ in range(100):
                line = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
                line.sendall(b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            asked = [await ask(daemon) for _ in range(20)]
            assert min(asked) < 0.05  # a busy machine does not slow every one
            async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
                assert len((await answer.read()).splitlines()) == 4
            await until(lambda: process.num_fds() <= before + 10)  # a runner and its pipes


@linux
async def test_without_descriptors_it_says_so_and_works_again_when_there_are_some(tmp_path: Path) -> None:
    quick = {**fake_runner(), "probe_interval": "0.1s"}
    async with serving(write_config(tmp_path, {"m": quick, "n": fake_runner()})) as daemon:
        pid, runner = daemon.child.pid, await daemon.load("m")
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, usual[1]))
        async with aiohttp.ClientSession(daemon.url, timeout=aiohttp.ClientTimeout(total=LIMIT)) as other:
            waiting = asyncio.create_task(_status(other, "/health"))
            await daemon.child.says("no connection can be accepted for now")
            async with daemon.http.post("/models/load", json={"model": "n"}) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"], error["src"]) == (503, "resource_exhausted", "mlxsup")
                assert answer.headers["Retry-After"] == "1"
                assert "no descriptors left" in error["message"]
            assert not waiting.done()
            await anyio.sleep(1.0)  # ten probes that cannot be made
            assert await daemon.pid_of("m") == runner
            resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
            assert await waiting == 200
            async with other.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
                assert len((await answer.read()).splitlines()) == 4
            with anyio.fail_after(LIMIT):
                while await _status(other, "/models/load", {"model": "n"}) != 200:
                    await anyio.sleep(0.1)
        told = [line for line in daemon.child.lines() if "no connection can be accepted" in line]
        assert len(told) == 1


@linux
async def test_a_full_disk_costs_a_warning_and_the_record_is_caught_up_with(tmp_path: Path) -> None:
    state = tmp_path / "mlxsup"
    env = {"STATE_DIRECTORY": str(state)}
    async with serving(write_config(tmp_path, {"m": fake_runner(), "n": fake_runner()}), env=env) as daemon:
        (record,) = state.glob("*/record.json")
        before = record.read_bytes()
        usual = resource.prlimit(daemon.child.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.child.pid, resource.RLIMIT_FSIZE, (0, usual[1]))
        for model in ("m", "n"):
            async with daemon.http.post("/completion", json={"model": model, "prompt": "p"}) as answer:
                assert len((await answer.read()).splitlines()) == 4
        await daemon.child.says("no record of runners is kept, for now")
        assert record.read_bytes() == before
        assert sorted(path.name for path in record.parent.iterdir()) == ["lock", "record.json"]
        resource.prlimit(daemon.child.pid, resource.RLIMIT_FSIZE, usual)
        await daemon.child.says("the record of runners is kept again")
        pids = {await daemon.pid_of(model) for model in ("m", "n")}
        assert {group["pgid"] for group in json.loads(record.read_text())["groups"]} == pids
        assert len([line for line in daemon.child.lines() if "no record of runners" in line]) == 1


@pytest.mark.parametrize("read", [True, False])
async def test_a_log_that_nobody_reads_holds_nothing_up(read: bool, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()}, listen=[f"unix:{tmp_path / 's'}"])
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mlxsup", "serve", "--config", str(config)), stderr=writer, cwd=tmp_path
    )
    os.close(writer)
    try:
        connector = aiohttp.UnixConnector(str(tmp_path / "s"))
        timeout = aiohttp.ClientTimeout(total=LIMIT)
        async with aiohttp.ClientSession("http://x", connector=connector, timeout=timeout) as http:
            await until(lambda: (tmp_path / "s").exists() and _waiting(reader) > 0)
            logged = await _fill_the_log(http, reader)
            assert await _status(http, "/models/load", {"model": "m"}) == 200
            async with http.get("/runners") as answer:
                runner = (await answer.json())["runners"][0]["pid"]
        process.send_signal(signal.SIGTERM)
        text = await asyncio.to_thread(_read_all, reader) if read else b""
        with anyio.fail_after(LIMIT):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(reader)
    assert not alive(runner)
    if read:
        events = [json.loads(line)["event"] for line in text.splitlines()]
        assert events[-1] == "stopped"
        assert events.count("POST /embedding") == logged


async def _fill_the_log(http: aiohttp.ClientSession, reader: int) -> int:
    """Ask for what is logged until the pipe takes no more, and as often again."""
    count, before, enough = 0, -1, 0
    while (held := _waiting(reader)) > before or count < 2 * enough:
        enough = count if held > before else enough
        before = held
        for _ in range(25):
            assert await _status(http, "/embedding", {"model": "m"}) == 501
        count += 25
    return count


async def _status(http: aiohttp.ClientSession, path: str, body: object = None) -> int:
    """Post a body, or get without one; return the status."""
    async with http.request("GET" if body is None else "POST", path, json=body) as answer:
        await answer.read()
        return answer.status


def _waiting(reader: int) -> int:
    """How many bytes a pipe holds."""
    count = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, count)
    return count[0]


def _read_all(reader: int) -> bytes:
    text = b""
    while part := os.read(reader, 65536):
        text += part
    return text


async def test_a_path_that_hangs_keeps_the_daemon_from_nothing_and_not_from_its_end(tmp_path: Path) -> None:
    """A file server that is gone, put on by hanging where files are opened: 16 models are more than a loop has threads."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, time\n"
        "def hang(event, arguments):\n"
        "    if event == 'open' and 'gone' in str(arguments[0]):\n"
        "        time.sleep(600)\n"
        "sys.addaudithook(hang)\n"
    )
    models = {"good": fake_runner()}
    for number in range(16):
        weights = tmp_path / f"gone{number}.safetensors"
        weights.touch()
        models[f"m{number}"] = fake_runner(path=str(weights))
        del models[f"m{number}"]["memory"]
    config = write_config(tmp_path, models)
    async with serving(config, env={"PYTHONPATH": str(tmp_path / "site")}) as daemon:
        loads = [
            asyncio.create_task(_status(daemon.http, "/models/load", {"model": f"m{number}"})) for number in range(16)
        ]
        with anyio.fail_after(LIMIT):
            while await _notes(daemon, "m") != ["reading its files"] * 16:
                await anyio.sleep(0.02)
        assert await _status(daemon.http, "/models/load", {"model": "good"}) == 200
        daemon.child.send(signal.SIGTERM)
        assert await daemon.child.ended() == 0
        assert {await load for load in loads} <= {503}


async def _notes(daemon: Daemon, start: str) -> list[str]:
    async with daemon.http.get("/runners") as answer:
        found = (await answer.json())["runners"]
    return [runner["note"] for runner in found if runner["model"].startswith(start)]
