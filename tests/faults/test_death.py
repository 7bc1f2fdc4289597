"""The runner dies, or never comes to life: who waits for it learns why, at once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.errors import EngineUnavailable, LoadFailed, MlxsupError, RunnerDied
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .house import Record, alive, collect, kill, report, state_is, supervisor, words

ADDRESSES = pytest.mark.parametrize("address", ["unix", "tcp"])
NOTICED = 1.0
"""Seconds within which a death must show, with room for a busy machine; the figure itself is 0.1."""


@ADDRESSES
async def test_kill_while_idle_is_seen_at_once(address: Any) -> None:
    async with supervisor(m=fake_runner("stderr@ready=I was fine", address=address)) as sup:
        await sup.load("m")
        kill(report(sup).pid)
        assert await state_is(sup, "failed", "backoff") < NOTICED
        assert report(sup).pid == -1
        assert report(sup).exits == 1
        assert "SIGKILL" in report(sup).last_error
        assert words(await collect(sup)) == "t1 t2 t3 "


async def test_kill_while_loading_fails_the_load_with_last_words() -> None:
    async with Gate() as gate, supervisor(m=fake_runner(f"stderr@loading=reading; gate@loading={gate.path}")) as sup:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_kill_at, gate, sup)
            with pytest.raises(LoadFailed) as caught:
                await sup.load("m")
        assert caught.value.details["signal"] == "SIGKILL"
        assert caught.value.details["stage"] == "loading"
        assert caught.value.details["last_words"] == ["reading"]
        assert await state_is(sup, "failed", "backoff") < NOTICED


async def _kill_at(gate: Gate, sup: Supervisor) -> None:
    await gate.arrival()
    await until(lambda: report(sup).pid > 0)  # the child may be quicker than the loop that has started it
    kill(report(sup).pid)


@ADDRESSES
@pytest.mark.parametrize("phase", ["request", "first", "2", "final"])
async def test_kill_while_streaming_raises_in_every_open_stream(address: Any, phase: str) -> None:
    streams = 3
    async with Gate() as gate:
        entry = fake_runner(
            f"tokens=4; stderr@{phase}=working; gate@{phase}={gate.path}", address=address, concurrency=streams
        )
        async with supervisor(m=entry) as sup:
            errors: list[MlxsupError] = []
            seen: list[str] = []

            async def one() -> None:
                try:
                    async with sup.completion("m", prompt="p") as chunks:
                        async for chunk in chunks:
                            seen.append(chunk.content)
                            assert not chunk.done
                except MlxsupError as error:
                    errors.append(error)

            async with anyio.create_task_group() as tasks:
                for _ in range(streams):
                    tasks.start_soon(one)
                for _ in range(streams):
                    await gate.arrival()
                kill(report(sup).pid)
                assert await until(lambda: len(errors) == streams) < NOTICED
            assert [type(error) for error in errors] == [RunnerDied] * streams
            assert all(error.details["signal"] == "SIGKILL" for error in errors)
            assert all("working" in error.details["last_words"] for error in errors)
            assert await state_is(sup, "failed", "backoff") < NOTICED
            await until(lambda: report(sup).leases == 0)


@pytest.mark.parametrize(
    ("how", "code", "number"),
    [("crash@2", None, "SIGKILL"), ("crash@2=SIGABRT", None, "SIGABRT"), ("exit@2=3", 3, None), ("exit@2=0", 0, None)],
)
async def test_own_death_in_a_stream_carries_the_words_written_just_before_it(
    how: str, code: int | None, number: str | None
) -> None:
    async with supervisor(m=fake_runner(f"{how}; stderr@crash=CUDA out of memory")) as sup:
        with pytest.raises(RunnerDied, match="CUDA out of memory") as caught:
            await collect(sup)
        details = caught.value.details
        assert (details["exit_code"], details["signal"]) == (code, number)
        assert details["cause"] == "out_of_memory"
        assert details["last_words"] == ["CUDA out of memory"]


@pytest.mark.parametrize("phase", ["start", "bind", "loading"])
@pytest.mark.parametrize("code", [0, 1])
async def test_exit_while_starting_fails_the_load_at_once(phase: str, code: int) -> None:
    async with supervisor(m=fake_runner(f"exit@{phase}={code}; stderr@crash=ModuleNotFoundError: no mlx")) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(LoadFailed) as caught:
            await sup.load("m")
        assert caught.value.details["exit_code"] == code
        assert caught.value.details["cause"] == "missing_library"
        assert "ModuleNotFoundError: no mlx" in caught.value.message
        assert await state_is(sup, "failed", "backoff") < NOTICED
        assert report(sup).exit_code == code


async def test_every_waiter_gets_the_cause_and_no_retry_storm_follows(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"record={record.path}; gate@start={gate.path}; exit@start=1")) as sup,
    ):
        errors: list[MlxsupError] = []

        async def one() -> None:
            try:
                await collect(sup)
            except MlxsupError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(one)
            arrival = await gate.arrival()
            await until(lambda: report(sup).queue == 20)
            arrival.go()
        assert [type(error) for error in errors] == [LoadFailed] * 20
        assert len({id(error) for error in errors}) == 20
        assert len(record.pids()) == 1


async def test_program_that_is_not_there() -> None:
    entry = {"engine": "command", "memory": "1MiB", "command": ["/nowhere/runner", "{port}"]}
    async with supervisor(m=entry) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(EngineUnavailable, match="/nowhere/runner") as caught:
            await collect(sup)
        assert caught.value.permanent
        assert report(sup).state in ("failed", "stopped")


async def test_program_that_is_not_executable(tmp_path: Path) -> None:
    program = tmp_path / "runner"
    program.write_text("#!/bin/sh\n")
    async with supervisor(m={"engine": "command", "memory": "1MiB", "command": [str(program), "{port}"]}) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(EngineUnavailable, match="not executable") as caught:
            await collect(sup)
        assert caught.value.permanent


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x01\x01" + bytes(57), b"no program at all\n", b"#!/nowhere/shell\n"])
async def test_program_for_another_machine(tmp_path: Path, content: bytes) -> None:
    program = tmp_path / "runner"
    program.write_bytes(content)
    program.chmod(0o700)
    async with supervisor(m={"engine": "command", "memory": "1MiB", "command": [str(program), "{port}"]}) as sup:
        with anyio.fail_after(LIMIT), pytest.raises(LoadFailed):
            await collect(sup)
        assert report(sup).pid == -1


async def test_after_a_crash_the_next_caller_gets_a_new_runner(tmp_path: Path) -> None:
    record = Record(tmp_path)
    async with supervisor(m=fake_runner(f"record={record.path}; once={tmp_path}/once; crash@1")) as sup:
        with pytest.raises(RunnerDied):
            await collect(sup)
        assert words(await collect(sup)) == "t1 t2 t3 "
        first, second = record.pids()
        assert first != second
        assert not alive(first)
        assert report(sup).pid == second


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_stopped_runner_can_be_unloaded() -> None:
    async with supervisor(m=fake_runner("", stop_grace="1s")) as sup:
        await sup.load("m")
        pid = report(sup).pid
        os.kill(pid, signal.SIGSTOP)
        with anyio.fail_after(2.5):
            await sup.unload("m")
        assert not alive(pid)


async def test_death_while_draining_ends_the_drain() -> None:
    async with (
        Gate() as gate,
        supervisor(m=fake_runner(f"gate@1={gate.path}")) as sup,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_expect_death, sup)
        await gate.arrival()
        tasks.start_soon(sup.unload, "m")
        await state_is(sup, "draining")
        kill(report(sup).pid)
        assert await state_is(sup, "failed", "stopped", "backoff") < NOTICED


async def _expect_death(sup: Supervisor) -> None:
    with pytest.raises(RunnerDied):
        await collect(sup)
