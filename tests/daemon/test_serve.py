"""`mlxsup serve` as a process: what it says, how it ends, and that no runner is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from pathlib import Path

import anyio
import pytest

from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT

from .children import alive, command, running, serving, write_config

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the daemon brings its own loop


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_0_and_no_runner_is_left(which: signal.Signals, tmp_path: Path) -> None:
    async with serving(write_config(tmp_path, {"m": fake_runner()})) as daemon:
        pid = await daemon.load("m")
        assert alive(pid)
        daemon.child.send(which)
        assert await daemon.child.ended() == 0
        assert not alive(pid)
        assert "stopped" in json.loads(daemon.child.lines()[-1])["event"]


async def test_work_in_flight_ends_well_and_new_work_is_refused(tmp_path: Path) -> None:
    async with Gate() as gate:
        config = write_config(tmp_path, {"m": fake_runner(f"tokens=3; gate@1={gate.path}")})
        async with serving(config) as daemon:
            async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
                await answer.content.readline()
                arrival = await gate.arrival()
                pid = await daemon.pid_of("m")
                daemon.child.send(signal.SIGTERM)
                await daemon.child.says("SIGTERM")
                async with daemon.http.get("/health") as health:
                    assert (health.status, await health.json()) == (503, {"status": "closing"})
                async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as refused:
                    assert refused.status == 503
                    assert (await refused.json())["error"]["code"] == "shutting_down"
                assert alive(pid)
                arrival.go()
                lines = [json.loads(line) for line in (await answer.read()).splitlines()]
                assert [line.get("content") for line in lines] == ["t2 ", "t3 ", None]
                assert lines[-1]["done"] is True
                assert "error" not in lines[-1]
            assert await daemon.child.ended() == 0
            assert not alive(pid)


async def test_a_second_signal_does_not_wait_for_work(tmp_path: Path) -> None:
    async with Gate() as gate:
        config = write_config(tmp_path, {"m": fake_runner(f"tokens=3; gate@1={gate.path}")})
        async with serving(config) as daemon:
            async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
                await answer.content.readline()
                await gate.arrival()
                pid = await daemon.pid_of("m")
                daemon.child.send(signal.SIGTERM)
                await daemon.child.says("SIGTERM: stopping;")
                daemon.child.send(signal.SIGTERM)
                last = json.loads((await answer.read()).splitlines()[-1])
                assert last["error"]["code"] in ("unloaded", "shutting_down")
            assert await daemon.child.ended() == 0
            assert not alive(pid)


async def test_a_signal_while_a_model_loads_ends_it_too(tmp_path: Path) -> None:
    async with serving(write_config(tmp_path, {"m": fake_runner("load=forever")})) as daemon:
        loading = asyncio.create_task(_load(daemon.url))
        with anyio.fail_after(LIMIT):
            while (pid := await daemon.pid_of("m")) < 0:
                await anyio.sleep(0.01)
        daemon.child.send(signal.SIGTERM)
        assert await daemon.child.ended() == 0
        assert not alive(pid)
        assert b"503" in await loading


async def test_a_taken_address_is_one_line_that_says_who_has_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config) as daemon:
        address = daemon.url.removeprefix("http://")
        code, _, lines = await command("serve", "--config", str(config), "--listen", address, cwd=tmp_path)
        assert code == 1
        assert len(lines) == 1
        assert lines[0].startswith(f"mlxsup: {address} is taken: mlxsup ")
        assert "--listen" in lines[0]
        async with daemon.http.get("/health") as answer:
            assert answer.status == 200
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code, _, lines = await command("serve", "--config", str(config), "--listen", address, cwd=tmp_path)
        assert code == 1
        assert lines == [f"mlxsup: {address} is taken by another program; end that, or give --listen another address"]


async def test_a_unix_socket_is_private_replaced_when_stale_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    config = write_config(tmp_path, {"m": fake_runner()})
    async with serving(config, "--listen", f"unix:{path}") as daemon:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        code, out, _ = await command("ps", "--url", f"unix:{path}", cwd=tmp_path)
        assert (code, out.splitlines()[1].split()[:2]) == (0, ["m", "stopped"])
        code, _, lines = await command("serve", "--config", str(config), "--listen", f"unix:{path}", cwd=tmp_path)
        assert (code, len(lines)) == (1, 1)
        assert "is taken: mlxsup" in lines[0]
        daemon.child.send(signal.SIGTERM)
        assert await daemon.child.ended() == 0
    assert not path.exists()


async def test_systemd_is_told_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(LIMIT)
        config = write_config(tmp_path, {"m": fake_runner()})
        async with serving(config, env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as daemon:
            assert manager.recv(100) == b"READY=1"
            daemon.child.send(signal.SIGTERM)
            assert await daemon.child.ended() == 0
            assert manager.recv(100) == b"STOPPING=1"


async def test_the_watchdog_of_systemd_hears_of_it_from_before_it_is_ready_until_it_ends(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(LIMIT)
        config = write_config(tmp_path, {"m": fake_runner()})
        # A queue of messages that nobody takes is short: /proc/sys/net/unix/max_dgram_qlen.
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"}
        async with serving(config, env=env) as daemon:
            heard = [manager.recv(100) for _ in range(3)]
            assert sorted(heard) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            daemon.child.send(signal.SIGSTOP)
            manager.settimeout(2.5)
            with pytest.raises(TimeoutError):
                while True:
                    assert manager.recv(100) == b"WATCHDOG=1"
            daemon.child.send(signal.SIGCONT)
            assert manager.recv(100) == b"WATCHDOG=1"
            daemon.child.send(signal.SIGTERM)
            assert await daemon.child.ended() == 0


async def test_runner_output_and_requests_are_lines_of_json_with_their_facts(tmp_path: Path) -> None:
    async with serving(write_config(tmp_path, {"m": fake_runner("stderr=hello there")})) as daemon:
        async with daemon.http.post("/models/load", json={"model": "m"}, headers={"x-request-id": "r1"}):
            pass
        said = json.loads(await daemon.child.says("hello there"))
        assert (said["event"], said["model"], said["stream"]) == ("hello there", "m", "stderr")
        noted = json.loads(await daemon.child.says("POST /models/load"))
        assert (noted["status"], noted["request_id"]) == (200, "r1")
        assert all(json.loads(line)["timestamp"] for line in daemon.child.lines())


async def test_a_client_that_asks_while_it_starts_waits_instead_of_being_refused(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    config = write_config(tmp_path, {"m": fake_runner()}, listen=[f"unix:{path}"])
    async with running("serve", "--config", str(config), cwd=tmp_path) as child:
        with anyio.fail_after(LIMIT):
            reader, writer = await _connect(path)
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            assert (await reader.readline()).endswith(b" 200 OK\r\n")
            writer.close()
        child.send(signal.SIGTERM)
        assert await child.ended() == 0


async def test_killed_it_leaves_no_runner(tmp_path: Path) -> None:
    async with serving(write_config(tmp_path, {"m": fake_runner()})) as daemon:
        pid = await daemon.load("m")
        os.kill(daemon.child.pid, signal.SIGKILL)
        assert await daemon.child.ended() == -signal.SIGKILL
        with anyio.fail_after(LIMIT):
            while alive(pid):
                await anyio.sleep(0.01)


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_unix_connection(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            await anyio.sleep(0.001)


async def _load(url: str) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model": "m"}'
    head = f"POST /models/load HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readline()
    writer.close()
    return answer
