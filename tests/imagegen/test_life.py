"""How the runner's process begins and ends: readiness, signals, orphans, and clear last words."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.imagegen.conftest import PATIENCE, RUNNER, Child, Start

GATED = """
import sys
from mlxsup.imagegen import server

resolve = server.resolve

def gated(*arguments):
    load = resolve(*arguments)
    def wait_and_load(progress):
        progress(0.25)
        print("gate", file=sys.stderr, flush=True)
        sys.stdin.read(1)
        return load(progress)
    return wait_and_load

server.resolve = gated
sys.exit(server.main("builtin:emoji", port=None, socket=sys.argv[1], ready_fd=int(sys.argv[2])))
"""

PARENT = """
import os, subprocess, sys
env = {**os.environ, "MLXSUP_SUPERVISOR_PID": str(os.getpid())}
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, env=env, pass_fds=[int(sys.argv[1])])
os.close(int(sys.argv[1]))
print(child.pid, flush=True)
child.wait()
"""


def last_words(*arguments: str, code: str = "") -> tuple[int, str]:
    """Run to the end; return exit code and last line of stderr."""
    command = [sys.executable, "-c", code, *arguments] if code else [*RUNNER, *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stderr.splitlines()[-1]


@dataclass
class Gate:
    """A runner that loads its model only when told to, and the pipe on which it says that it is ready."""

    child: Child
    ready: int

    def open(self) -> None:
        assert self.child.process.stdin is not None
        self.child.process.stdin.write(b"\n")
        self.child.process.stdin.flush()

    def is_ready(self) -> bool:
        return bool(select.select([self.ready], [], [], 0)[0])


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    ready, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", GATED, str(tmp_path / "s"), str(write_end)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(write_end,),
    ) as process:
        os.close(write_end)
        child = Child(process, str(tmp_path / "s"))
        try:
            child.line_with("gate")
            yield Gate(child, ready)
        finally:
            os.close(ready)
            process.kill()


@pytest.mark.anyio
async def test_health_says_loading_until_the_model_is_loaded(gate: Gate) -> None:
    assert await gate.child.health() == (503, {"status": "loading", "progress": 0.25})
    assert (await gate.child.refusal(b'{"prompt": "x"}'))[:2] == (503, "loading")
    assert not gate.is_ready()
    gate.open()
    assert len(await anyio.to_thread.run_sync(os.read, gate.ready, 9)) == 1
    assert await anyio.to_thread.run_sync(os.read, gate.ready, 9) == b""
    status, health = await gate.child.health()
    assert status == 200
    assert (health["status"], health["pid"]) == ("ok", gate.child.process.pid)
    assert (health["model"], health["busy"]) == ("builtin:emoji", False)
    assert set(health["memory"]) == {"active", "peak", "cache"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_it_cleanly(gate: Gate, number: signal.Signals) -> None:
    began = time.monotonic()
    gate.child.process.send_signal(number)
    assert gate.child.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 1
    assert not Path(gate.child.socket).exists()


@pytest.mark.anyio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_gives_up_the_picture_in_work(start: Start, number: signal.Signals) -> None:
    child = start()
    async with child.session() as session, session.post("/completion", json={"prompt": "x", "steps": 200}) as answer:
        await answer.content.readline()
        await answer.content.readline()
        began = time.monotonic()
        child.process.send_signal(number)
        lines = (await answer.read()).splitlines()
    assert await anyio.to_thread.run_sync(child.process.wait, PATIENCE) == 0
    assert time.monotonic() - began < 1
    assert lines[-1] == b'{"content":"error: the runner is ending","done":true}'
    assert not await anyio.Path(child.socket).exists()


def test_an_idle_runner_ends_at_once(start: Start) -> None:
    child = start()
    began = time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 1


def test_it_ends_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    ready, write_end = os.pipe()
    runner = [*RUNNER, "--socket", str(tmp_path / "s"), "--ready-fd", str(write_end)]
    command = [sys.executable, "-c", PARENT, str(write_end), *runner]
    with (
        os.fdopen(ready, "rb", buffering=0) as ready_pipe,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(write_end,)) as parent,
    ):
        os.close(write_end)
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert int(parent.stdout.readline())
        assert ready_pipe.read(1)
        parent.kill()
        # stderr stays open for as long as the runner lives.
        assert b"supervisor is gone" in parent.stderr.read()
    assert not (tmp_path / "s").exists()


def test_a_runner_of_another_parent_ends_at_once() -> None:
    command = [*RUNNER, "--port", "0"]
    env = {**os.environ, "MLXSUP_SUPERVISOR_PID": "1"}
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE, env=env, check=True)
    assert b"supervisor is gone" in done.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("builtin:cat", "builtin:emoji"),
        ("/nowhere/model", "no model at /nowhere/model: there is no such file or folder"),
        (str(Path(__file__).parent), "nothing that the image runner can load"),
    ],
)
def test_a_name_that_means_no_model_is_told_in_one_line(model: str, words: str) -> None:
    code, line = last_words("--port", "0", "--model", model)
    assert code == 1
    assert line.startswith("mlxsup runner: ")
    assert words in line


def test_missing_mlx_is_told_with_its_mend() -> None:
    hide = "import sys; sys.modules['mlx'] = None; from mlxsup.imagegen.server import main;"
    code, line = last_words(code=hide + "sys.exit(main('builtin:emoji', port=0, socket=None))")
    assert code == 1
    assert line.startswith("mlxsup runner: MLX is not importable: ")
    assert line.endswith("; mend: pip install 'mlxsup[imagegen]'")


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert last_words("--port", str(port)) == (
            1,
            f"mlxsup runner: cannot listen on 127.0.0.1:{port}: Address already in use",
        )


def test_a_bound_that_lets_nothing_pass_is_told() -> None:
    said = last_words("--port", "0", "--max-pixels=0")
    assert said == (1, "mlxsup runner: max_pixels must be 1 or more, not 0")


def test_a_port_that_is_none_is_told() -> None:
    code, line = last_words("--port", "70000")
    assert code == 1
    assert line.startswith("mlxsup runner: cannot listen on 127.0.0.1:70000: ")


def test_a_socket_in_use_is_told_and_left_alone(start: Start) -> None:
    child = start()
    code, line = last_words("--socket", child.socket)
    assert (code, line) == (1, f"mlxsup runner: cannot listen on {child.socket}: Address already in use")
    assert Path(child.socket).exists()


def test_a_socket_that_a_dead_runner_left_is_replaced(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s0"))
    child = start()
    assert child.socket == str(tmp_path / "s0")
    assert Path(child.socket).stat().st_mode & 0o077 == 0


def test_the_runner_is_small_and_needs_no_numpy() -> None:
    script = (
        "import sys, psutil; from mlxsup.imagegen import service; from mlxsup.imagegen.pipelines import base, catalog;"
        "pipeline = catalog.resolve('builtin:emoji')(lambda done: None);"
        "pipeline.generate(base.Order('sun', 256, 256, 4, 1, 1.0), lambda step, total, preview=None: None);"
        "print('numpy' in sys.modules, psutil.Process().memory_info().rss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=True
    )
    numpy, memory = done.stdout.split()
    assert numpy == "False"
    assert int(memory) < 250 << 20
