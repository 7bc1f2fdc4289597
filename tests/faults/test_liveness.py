"""Runners that live and do no work: stopped ones and wedged ones are ended and made anew, busy ones are left alone."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import MlxsupError, Supervisor
from mlxsup.errors import LoadFailed, RunnerDied
from mlxsup.testing import EventRecorder, Gate, fake_runner
from tests.faults.house import Record, alive, collect, kill, report, state_is, supervisor, words
from tests.waiting import LIMIT

pytestmark = pytest.mark.anyio

QUICK: dict[str, Any] = {"probe_interval": "0.05s", "probe_timeout": "0.1s"}


async def test_a_stopped_runner_is_seen_and_ended_while_it_streams() -> None:
    async with Gate() as gate, supervisor(m=fake_runner(f"tokens=5; gate@2={gate.path}")) as sup:
        work = asyncio.create_task(collect(sup))
        await gate.arrival("2")
        pid = report(sup).pid
        began = time.monotonic()
        kill(pid, signal.SIGSTOP)
        with anyio.fail_after(LIMIT), pytest.raises(RunnerDied, match="was stopped and does no work") as caught:
            await work
        assert time.monotonic() - began < 5.0  # two looks a second apart, and room for a busy machine
        assert caught.value.details["cause"] == "wedged"
        await state_is(sup, "failed")
        assert not alive(pid)
        gate.open()
        assert words(await collect(sup)) == "t1 t2 t3 t4 t5 "
        assert report(sup).pid != pid


async def test_a_stopped_runner_is_seen_and_ended_while_it_idles() -> None:
    async with supervisor(m=fake_runner()) as sup, EventRecorder(sup) as recorder:
        await sup.load("m")
        pid = report(sup).pid
        kill(pid, signal.SIGSTOP)
        with anyio.fail_after(LIMIT):
            event = await recorder.until("m", "failed")
        assert "stopped" in event.reason
        assert not alive(pid)


@pytest.mark.parametrize("phase", ["start", "bind", "loading"])
@pytest.mark.parametrize("announce", [False, True])
async def test_a_runner_that_is_stopped_while_it_starts_is_ended_long_before_the_load_timeout(
    phase: str, announce: bool, tmp_path: Path
) -> None:
    record = Record(tmp_path)
    scenario = f"once={tmp_path / 'once'}; record={record.path}; freeze@{phase}"
    async with supervisor(m=fake_runner(scenario, announce=announce, load_timeout="10m")) as sup:
        began = time.monotonic()
        with anyio.fail_after(LIMIT), pytest.raises(LoadFailed, match="was stopped and does no work") as caught:
            await sup.load("m")
        assert time.monotonic() - began < 6.0  # two looks a second apart, and room for a busy machine
        assert (caught.value.details["cause"], caught.value.details["stage"]) == ("wedged", "loading")
        await state_is(sup, "failed", "backoff")
        assert not any(alive(pid) for pid in record.pids())
        with anyio.fail_after(LIMIT):
            while report(sup).state != "ready":
                with suppress(MlxsupError):
                    await sup.load("m")
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_an_idle_runner_that_does_not_answer_its_health_is_ended() -> None:
    async with supervisor(m=fake_runner("wedge@end", **QUICK)) as sup, EventRecorder(sup) as recorder:
        assert words(await collect(sup)) == "t1 t2 t3 "
        pid = report(sup).pid
        with anyio.fail_after(LIMIT):
            event = await recorder.until("m", "failed")
        assert "did not answer 3 probes" in event.reason
        assert not alive(pid)
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_a_busy_runner_that_does_not_answer_its_health_is_left_alone() -> None:
    async with Gate() as gate:
        entry = fake_runner(f"wedge@request; tokens=3; gate@1={gate.path}", silence_timeout="30s", **QUICK)
        async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder:
            work = asyncio.create_task(collect(sup))
            arrival = await gate.arrival("1")
            await asyncio.sleep(1.0)  # time for six missed probes
            assert recorder.states("m") == ["starting", "ready"]
            arrival.go()
            assert words(await work) == "t1 t2 t3 "


async def test_a_busy_runner_that_is_silent_too_is_ended() -> None:
    entry = fake_runner(
        "wedge@request; tokens=3; hang@1", silence_timeout="0.3s", first_chunk_timeout="1s", concurrency=2, **QUICK
    )
    async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder:
        async with sup.lease("m"):
            with anyio.fail_after(LIMIT), pytest.raises(MlxsupError):
                await collect(sup)
            with anyio.fail_after(LIMIT):
                event = await recorder.until("m", "failed")
        assert "silent" in event.reason or "did not answer" in event.reason


async def test_one_whose_reader_takes_nothing_for_long_is_left_alone() -> None:
    scenario = "wedge@request; tokens=1; " + "; ".join(["big@1=0.0625"] * 100)
    entry = fake_runner(scenario, silence_timeout="1s", **QUICK)
    async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder, sup.completion("m", prompt="p") as chunks:
        await anext(chunks)
        await asyncio.sleep(2.5)  # the runner waits in a write all the while
        assert len([chunk async for chunk in chunks]) == 101
        assert recorder.states("m") == ["starting", "ready"]


async def leave_in_its_prefill(sup: Supervisor, gate: Gate) -> None:
    work = asyncio.create_task(collect(sup))
    await gate.arrival()
    work.cancel()
    await asyncio.wait({work})
    assert (report(sup).state, report(sup).leases) == ("ready", 0)


async def test_one_whose_caller_left_in_a_long_prefill_is_left_alone() -> None:
    async with Gate() as gate:
        entry = fake_runner(f"wedge@request; gate@first={gate.path}", first_chunk_timeout="30s", **QUICK)
        async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder:
            await leave_in_its_prefill(sup, gate)
            await asyncio.sleep(1.0)  # time for six missed probes
            assert recorder.states("m") == ["starting", "ready"]


async def test_but_not_longer_than_a_prefill_may_take() -> None:
    async with Gate() as gate:
        entry = fake_runner(f"wedge@request; gate@first={gate.path}", first_chunk_timeout="2s", **QUICK)
        async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder:
            await leave_in_its_prefill(sup, gate)
            with anyio.fail_after(LIMIT):
                event = await recorder.until("m", "failed")
            assert "did not answer" in event.reason


async def test_the_wall_clock_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    async with supervisor(m=fake_runner(keep_alive="1h")) as sup, EventRecorder(sup) as recorder:
        await sup.load("m")
        for days in (1, -1):
            monkeypatch.setattr(time, "time", lambda days=days: real() + days * 86400)
            assert words(await collect(sup)) == "t1 t2 t3 "
        assert recorder.states("m") == ["starting", "ready"]
        assert report(sup).state == "ready"


SINGLE = """
import http.server, socket, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for _ in range(12):
            self.wfile.write(b'{"content":"a"}\\n')
            time.sleep(0.25)
        self.wfile.write(b'{"done":true}\\n')
        time.sleep(0.8)

class Server(http.server.HTTPServer):
    allow_reuse_address = allow_reuse_port = True

    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_one_that_tidies_up_after_a_long_answer_is_left_alone() -> None:
    """It has a single thread, so that it answers no probe while it works nor just after."""
    entry = {"engine": "command", "memory": "1MiB", "command": [sys.executable, "-I", "-S", "-c", SINGLE, "{port}"]}
    async with supervisor(m={**entry, "probe_interval": "0.2s", "probe_timeout": "0.6s"}) as sup:
        await sup.load("m")
        pid = report(sup).pid
        assert words(await collect(sup)) == 12 * "a"
        await anyio.sleep(1.5)  # what is looked for is that nothing happens
        assert (report(sup).state, report(sup).pid) == ("ready", pid)
