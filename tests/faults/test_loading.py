"""Loading that takes its time, never ends, or loses its audience."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup.errors import LoadFailed, LoadTimeout, Unloaded
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, alive, collect, report, state_is, supervisor, words


@pytest.mark.parametrize("address", ["unix", "tcp"])
async def test_loading_for_ever_times_out_with_stage_and_last_words(address: Any) -> None:
    entry = fake_runner("load=forever; stderr@loading=reading shard 3 of 9", address=address, load_timeout="0.5s")
    async with supervisor(m=entry) as sup:
        began = time.monotonic()
        with pytest.raises(LoadTimeout, match="reading shard 3 of 9") as caught:
            await collect(sup)
        assert 0.5 <= time.monotonic() - began < 4
        assert caught.value.details["stage"] == "loading"
        assert caught.value.details["last_words"] == ["reading shard 3 of 9"]
        await state_is(sup, "failed", "backoff")
        assert report(sup).pid == -1


@pytest.mark.parametrize("phase", ["start", "bind"])
async def test_hang_before_it_listens_times_out_too(phase: str, tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; hang@{phase}", load_timeout="0.5s")) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(LoadTimeout):
            await collect(sup)
        await until(lambda: not alive(record.pids()[0]))


async def test_wedged_health_while_loading_times_out() -> None:
    async with supervisor(m=fake_runner("wedge@bind", load_timeout="0.5s")) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(LoadTimeout, match="answer"):
            await collect(sup)


async def test_progress_moves_the_load_timeout_on() -> None:
    async with supervisor(m=fake_runner("load=2", load_timeout="0.7s")) as sup:
        await sup.load("m")
        assert report(sup).state == "ready"


async def test_load_cap_holds_in_spite_of_progress() -> None:
    async with supervisor(m=fake_runner("load=30", load_timeout="5s", load_cap="1s")) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(LoadTimeout, match="cap"):
            await sup.load("m")


async def test_output_alone_is_no_progress() -> None:
    scenario = "progress=none; " + "; ".join("stderr@loading=still here; delay@loading=0.2" for _ in range(40))
    async with supervisor(m=fake_runner(scenario, load_timeout="0.8s")) as sup:
        with anyio.fail_after(4), pytest.raises(LoadTimeout, match="still here"):
            await sup.load("m")


async def test_growing_memory_is_progress() -> None:
    scenario = "progress=none; " + "; ".join("alloc@loading=4; delay@loading=0.2" for _ in range(10))
    async with supervisor(m=fake_runner(scenario, load_timeout="0.8s")) as sup:
        await sup.load("m")


async def test_progress_is_reported_while_loading() -> None:
    async with supervisor(m=fake_runner("loading=8")) as sup:
        seen: set[float | None] = set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sup.load, "m")
            while report(sup).state != "ready":
                seen.add(report(sup).progress)
                await anyio.sleep(0.001)
        assert seen & {0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875}


async def test_runner_that_announces_itself_needs_no_probe() -> None:
    async with supervisor(m=fake_runner("load=0.3; wedge@start", announce=True)) as sup:
        with anyio.fail_after(LIMIT):
            await sup.load("m")


LATE = """
import http.server, os, signal, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(b"")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        os.write(int(sys.argv[2]), b"1")
        self.reply(b'{"content":"alive","done":true}\\n')

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in programs that are not Python's
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_who_announces_itself_after_a_probe_was_answered_lives() -> None:
    command = [sys.executable, "-I", "-c", LATE, "{port}", "{ready_fd}"]
    async with supervisor(m={"engine": "command", "memory": "1MiB", "command": command}) as sup:
        with anyio.fail_after(LIMIT):
            assert words(await collect(sup)) == "alive"
        assert report(sup).state == "ready"


async def test_the_load_goes_on_when_the_first_caller_leaves(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate, supervisor(m=fake_runner(f"record={record.path}; gate@loading={gate.path}")) as sup:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect, sup)
            arrival = await gate.arrival()
            tasks.cancel_scope.cancel()
        await until(lambda: report(sup).queue == 0)
        assert report(sup).state == "starting"
        arrival.go()
        await state_is(sup, "ready")
        assert words(await collect(sup)) == "t1 t2 t3 "
        assert len(record.pids()) == 1
        assert len(record.lines("request")) == 1


async def test_a_hundred_callers_of_whom_one_stays_make_one_spawn(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate, supervisor(m=fake_runner(f"record={record.path}; gate@start={gate.path}")) as sup:
        answers: list[str] = []

        async def caller(scope: anyio.CancelScope) -> None:
            with scope:
                answers.append(words(await collect(sup)))

        scopes = [anyio.CancelScope() for _ in range(100)]
        async with anyio.create_task_group() as tasks:
            for scope in scopes:
                tasks.start_soon(caller, scope)
            arrival = await gate.arrival()
            await until(lambda: report(sup).queue == 100)
            for number, scope in enumerate(scopes):
                if number != 57:
                    scope.cancel()
            await until(lambda: report(sup).queue == 1)
            arrival.go()
        assert answers == ["t1 t2 t3 "]
        assert len(record.pids()) == 1
        assert len(record.lines("request")) == 1


async def test_loads_of_two_models_go_side_by_side() -> None:
    async with Gate() as gate:
        entry = fake_runner(f"gate@loading={gate.path}")
        async with supervisor(a=entry, b=entry, c=fake_runner()) as sup, anyio.create_task_group() as tasks:
            tasks.start_soon(sup.load, "a")
            tasks.start_soon(sup.load, "b")
            first, second = await gate.arrival(), await gate.arrival()
            assert words(await collect(sup, "c")) == "t1 t2 t3 "
            second.go()
            first.go()


async def test_unload_while_loading_stops_it_and_tells_the_waiters(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate, supervisor(m=fake_runner(f"record={record.path}; gate@loading={gate.path}")) as sup:
        async with anyio.create_task_group() as tasks:

            async def waiter() -> None:
                with pytest.raises(Unloaded):
                    await collect(sup)

            tasks.start_soon(waiter)
            await gate.arrival()
            with anyio.fail_after(LIMIT):
                await sup.unload("m")
        assert report(sup).state == "stopped"
        assert not alive(record.pids()[0])
        gate.open()
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_leaving_the_supervisor_while_loading_leaves_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with Gate() as gate:
        entry = fake_runner(f"record={record.path}; gate@loading={gate.path}")
        async with supervisor(m=entry) as sup, anyio.create_task_group() as tasks:
            tasks.start_soon(sup.load, "m")
            await gate.arrival()
            tasks.cancel_scope.cancel()
        assert not alive(record.pids()[0])


async def test_health_that_says_500_is_not_ready() -> None:
    async with supervisor(m=fake_runner("health=500", load_timeout="0.5s")) as sup:
        with anyio.fail_after(LIMIT), pytest.raises((LoadTimeout, LoadFailed)):
            await sup.load("m")
