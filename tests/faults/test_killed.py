"""The supervisor itself is killed: within a second no runner, no grandchild and no socket of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxsup.testing import fake_runner

from .house import Record, alive

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
LIMIT = 10.0
KEEPER = Path(__file__).with_name("keeper.py")
LINUX = sys.platform == "linux"


@contextmanager
def keeper(
    loop: str, load: list[str], states: dict[str, str] | None = None, **models: dict[str, Any]
) -> Iterator[subprocess.Popen[str]]:
    """A program with a supervisor of its own, in which the models of `load` are loaded and those of `states` go on from there.

    `states` has `streaming`, `draining` or `stopping` for a model; those of neither are asked for and not waited for.
    """
    told = dict.fromkeys(load, "ready") | (states or {})
    command = [sys.executable, str(KEEPER), loop, json.dumps(models), json.dumps(told)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "up\n"
            yield program
        finally:
            program.kill()


def until(true: Callable[[], object], limit: float = LIMIT) -> float:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit, f"not within {limit} s"
        time.sleep(0.005)
    return time.monotonic() - began


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).iterdir())


def left_behind(record: Record) -> list[int]:
    return [pid for pid in record.pids() + record.pids("fork") if alive(pid)]


@LOOPS
@pytest.mark.parametrize(
    "options", ["", "ignore", *(["setsid+ignore", "setsid+orphan+ignore", "setsid+nopipes"] if LINUX else [])]
)
def test_no_runner_and_no_grandchild_outlives_a_kill(tmp_path: Path, loop: str, options: str) -> None:
    record = Record(tmp_path)
    ready = fake_runner(f"record={record.path}; fork@ready={options}; ignore=SIGTERM+SIGINT")
    loading = fake_runner(f"record={record.path}; load=forever; fork@loading={options}")
    frozen = fake_runner(f"record={record.path}; load=forever; freeze@loading")
    before = folders()
    with keeper(loop, ["a", "b"], a=ready, b=ready, c=loading, d=frozen) as program:
        until(lambda: len(record.pids()) == 4 and len(record.pids("fork")) == 3)
        family = [child.pid for child in psutil.Process(program.pid).children(recursive=True)]
        assert len(left_behind(record)) == 7
        program.kill()
        program.wait()
        until(lambda: not left_behind(record), 1.0)
        until(lambda: not any(map(alive, family)))  # the sentinel included
    until(lambda: folders() <= before)


@LOOPS
@pytest.mark.parametrize("options", ["ignore", *(["setsid+ignore"] if LINUX else [])])
def test_a_kill_while_runners_work_drain_and_stop_leaves_none(tmp_path: Path, loop: str, options: str) -> None:
    record = Record(tmp_path)
    scenario = f"record={record.path}; fork@ready={options}; ignore=SIGTERM+SIGINT; hang@1"
    states = {state[0]: state for state in ("streaming", "draining")} | {"e": "stopping"}
    models = dict.fromkeys(states, fake_runner(scenario, stop_grace="60s", drain_timeout="60s"))
    before = folders()
    with keeper(loop, [], states, **models) as program:
        until(lambda: len(left_behind(record)) == 6 and record.lines("signal") == ["signal SIGTERM"])
        program.kill()
        program.wait()
        until(lambda: not left_behind(record), 1.0)
    until(lambda: folders() <= before)


@LOOPS
def test_nobody_outlives_a_kill_after_the_sentinel_was_killed_first(tmp_path: Path, loop: str) -> None:
    """A sentinel that dies is replaced, and the new one knows of the runners that were there before it."""
    record = Record(tmp_path)
    entry = fake_runner(f"record={record.path}; fork@ready=setsid+ignore")
    with keeper(loop, ["a"], a=entry, b=fake_runner(f"record={record.path}; load=forever")) as program:
        until(lambda: len(record.pids()) == 2 and record.pids("fork"))
        (first,) = sentinels(program, record)
        os.kill(first, signal.SIGKILL)
        until(lambda: sentinels(program, record) not in ([], [first]))
        program.kill()
        program.wait()
        until(lambda: not left_behind(record), 1.0)


def sentinels(program: subprocess.Popen[str], record: Record) -> list[int]:
    """The living children of the program that are no runners."""
    runners = {*record.pids(), *record.pids("fork")}
    children = [child.pid for child in psutil.Process(program.pid).children()]
    return [pid for pid in children if pid not in runners and alive(pid)]


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT])
def test_any_other_violent_end_is_the_same(tmp_path: Path, loop: str, number: signal.Signals) -> None:
    record = Record(tmp_path)
    with keeper(loop, ["a"], a=fake_runner(f"record={record.path}; fork@ready=ignore; ignore=SIGTERM")) as program:
        until(lambda: record.pids("fork"))
        program.send_signal(number)
        program.wait()
        until(lambda: not left_behind(record), 1.0)


@LOOPS
def test_ctrl_c_ends_in_order(tmp_path: Path, loop: str) -> None:
    record = Record(tmp_path)
    with keeper(loop, ["a"], a=fake_runner(f"record={record.path}")) as program:
        program.send_signal(signal.SIGINT)
        program.wait()
        assert record.lines("signal") == ["signal SIGTERM"]
        assert not left_behind(record)


@LOOPS
def test_a_kill_between_spawn_and_ready_leaves_nothing(tmp_path: Path, loop: str) -> None:
    """Whenever it comes: the supervisor is killed at growing times after its first spawn began."""
    for step in range(6):
        record = Record(tmp_path, f"record{step}")
        with keeper(loop, [], a=fake_runner(f"record={record.path}; load=forever; ignore=SIGTERM")) as program:
            time.sleep(0.02 * step)
            program.kill()
            program.wait()
            time.sleep(0.3)
            until(lambda record=record: not left_behind(record), 1.0)  # type: ignore[misc]
