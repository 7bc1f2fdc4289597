"""The scripted runner does what its scenario says: the other tests believe it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxsup.testing import fake_runner, picture

from .scripted import Scripted, SyncGate, state

POST = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n" + b'{"prompt":"p"}'


@pytest.fixture
def gate() -> Iterator[SyncGate]:
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        found = SyncGate(Path(folder))
        yield found
        found.close()


def drained(connection: socket.socket) -> bytes:
    pieces = []
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def test_answers_with_the_asked_number_of_tokens_and_a_final_line() -> None:
    with Scripted("tokens=2") as runner:
        lines = runner.lines(seed=7)
    assert [line.get("content") for line in lines] == ["t1 ", "t2 ", None]
    assert lines[-1]["done"] is True
    assert lines[-1]["seed"] == 7


def test_serves_tcp_as_well() -> None:
    with Scripted("tokens=1", tcp=True) as runner:
        assert runner.get()[0] == 200
        assert len(runner.lines()) == 2


def test_image_answer_has_steps_from_zero_and_the_promised_picture() -> None:
    with Scripted("steps=2; image=1000") as runner:
        *steps, last = runner.lines()
    assert steps == [{"step": 0, "total": 2}, {"step": 1, "total": 2}, {"step": 2, "total": 2}]
    assert base64.b64decode(last["image"]) == picture(1000)


def test_image_steps_default_to_what_was_asked_for() -> None:
    with Scripted("image=10") as runner:
        assert runner.lines(steps=7)[-2] == {"step": 7, "total": 7}


def test_keeps_its_connection_for_the_next_request() -> None:
    with Scripted("tokens=1") as runner:
        connection = runner.connection()
        for _ in range(3):
            connection.request("POST", "/completion", json.dumps({"prompt": "p"}))
            assert connection.getresponse().read().endswith(b"}\n")
        connection.close()


def test_loading_for_a_number_of_probes_shows_growing_progress() -> None:
    with Scripted("loading=3", wait="listening") as runner:
        found: list[tuple[int, dict[str, Any]]] = []
        while not found or found[-1][0] == 503:
            found.append(runner.get())
    assert [status for status, _ in found[:3]] == [503] * 3
    progress = [body["progress"] for status, body in found if status == 503]
    assert progress == sorted(progress)
    assert progress[0] < progress[-1]
    assert found[-1][1]["status"] == "ok"


def test_load_forever_stays_at_503_and_refuses_work() -> None:
    with Scripted("load=forever; progress=0.5", wait="listening") as runner:
        assert runner.get() == (503, {"status": "loading", "progress": 0.5})
        assert runner.post()[0] == 503


def test_progress_can_be_kept_silent() -> None:
    with Scripted("load=forever; progress=none", wait="listening") as runner:
        assert runner.get() == (503, {"status": "loading"})


def test_health_tells_pid_model_and_memory() -> None:
    with Scripted("alloc=3") as runner:
        _, health = runner.get()
        assert health == {
            "status": "ok",
            "pid": runner.child.pid,
            "model": "m",
            "busy": False,
            "memory": {"active": 3 << 20, "peak": 3 << 20, "cache": 0},
        }


def test_health_can_fail_once_ready() -> None:
    with Scripted("health=500:broken") as runner:
        connection = runner.connection()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (500, b"broken")
        connection.close()


def test_wedge_takes_health_but_gives_no_answer() -> None:
    with Scripted("wedge@ready; tokens=1") as runner:
        connection = runner.raw(b"GET /health HTTP/1.1\r\n\r\n")
        connection.settimeout(0.2)
        with connection, pytest.raises(TimeoutError):
            connection.recv(1)
        assert len(runner.lines()) == 2


@pytest.mark.parametrize("phase", ["start", "bind", "loading", "ready"])
def test_exits_with_a_code_at_a_phase_after_its_last_words(phase: str) -> None:
    with Scripted(f"exit@{phase}=3; stderr@crash=out of memory \\x3b sorry", wait="") as runner:
        assert runner.ended() == 3
        assert runner.stderr.read_text() == "out of memory ; sorry\n"


@pytest.mark.parametrize(("word", "number"), [("crash", signal.SIGKILL), ("crash=SIGABRT", signal.SIGABRT)])
def test_crash_is_a_signal(word: str, number: int) -> None:
    with Scripted(f"{word}; stderr@crash=last", wait="") as runner:
        assert runner.ended() == -number
        assert runner.stderr.read_text() == "last\n"


@pytest.mark.parametrize(("phase", "lines"), [("request", 0), ("first", 0), ("2", 2), ("final", 3)])
def test_crash_in_an_answer_cuts_it_there(phase: str, lines: int) -> None:
    with Scripted(f"crash@{phase}") as runner:
        received = drained(runner.raw(POST))
        assert runner.ended() == -signal.SIGKILL
    assert received.count(b"content") == lines
    assert b"done" not in received
    assert (b"HTTP/1.1 200" in received) == (phase != "request")


def test_freeze_stops_the_process_until_it_is_continued() -> None:
    with Scripted("freeze@ready") as runner:
        runner.wait_until(lambda: state(runner.child.pid) == "T")
        os.kill(runner.child.pid, signal.SIGCONT)
        runner.wait_until(lambda: state(runner.child.pid) != "T")


@pytest.mark.parametrize("phase", ["start", "bind", "loading", "ready"])
def test_gate_holds_the_process_in_its_phase(gate: SyncGate, phase: str) -> None:
    with Scripted(f"gate@{phase}={gate.path}; exit@{phase}=5", wait="") as runner:
        arrived, held = gate.arrival()
        assert arrived == phase
        assert runner.child.poll() is None
        held.sendall(b"x")
        assert runner.ended() == 5
        held.close()


def test_gate_holds_an_answer_until_a_byte_comes(gate: SyncGate) -> None:
    with Scripted(f"tokens=2; gate@1={gate.path}") as runner, runner.raw(POST) as connection:
        phase, held = gate.arrival()
        assert phase == "1"
        assert b"t2" not in connection.recv(65536)
        with held:
            held.sendall(b"x")
        received = b""
        while b'"done"' not in received:
            received += connection.recv(65536)


def test_gate_lets_an_answer_go_when_its_client_leaves(gate: SyncGate) -> None:
    with Scripted(f"gate@first={gate.path}") as runner:
        connection = runner.raw(POST)
        _, held = gate.arrival()
        connection.close()
        with held:
            assert held.recv(1) == b""
        runner.wait_until(lambda: "gone 1" in runner.record())


def test_actions_can_be_meant_for_one_request() -> None:
    with Scripted("tokens=1; error@first#2=no") as runner:
        assert [len(runner.lines()) for _ in range(3)] == [2, 1, 2]


def test_hang_in_an_answer_ends_when_the_client_leaves() -> None:
    with Scripted("hang@1") as runner:
        connection = runner.raw(POST)
        while b"t1" not in connection.recv(65536):
            pass
        connection.close()
        runner.wait_until(lambda: "gone 1" in runner.record())


def test_ignore_gone_goes_on_without_a_client() -> None:
    with Scripted("delay=0.02; tokens=10; ignore-gone") as runner:
        runner.raw(POST).close()
        runner.wait_until(lambda: "done 1" in runner.record())
        assert "gone 1" not in runner.record()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_ends_cleanly_on_a_signal_unless_told_to_ignore_it(name: str) -> None:
    number = signal.Signals[name]
    with Scripted() as runner:
        os.kill(runner.child.pid, number)
        assert runner.ended() == 0
        assert runner.record()[-1] == f"signal {name}"
    with Scripted(f"ignore=SIGTERM+SIGINT; stderr@{name.lower()}=not me") as runner:
        os.kill(runner.child.pid, number)
        runner.wait_until(lambda: f"signal {name}" in runner.record())
        assert runner.get()[0] in (200, 503)
        runner.wait_until(lambda: runner.stderr.read_text() == "not me\n")


def test_signals_are_obeyed_at_a_gate_of_the_process(gate: SyncGate) -> None:
    with Scripted(f"gate@loading={gate.path}", wait="") as runner:
        _, held = gate.arrival()
        os.kill(runner.child.pid, signal.SIGTERM)
        assert runner.ended() == 0
        held.close()


def test_exit_on_a_signal_with_a_code_of_its_own() -> None:
    with Scripted("exit@sigterm=9") as runner:
        os.kill(runner.child.pid, signal.SIGTERM)
        assert runner.ended() == 9


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("plain", b"xxx"), ("lines", b"yy\n"), ("bars", b"##|\r"), ("binary", b"\x00\x01\x02"), ("utf8", b"\xff")],
)
def test_floods_stderr(kind: str, sign: bytes) -> None:
    with Scripted(f"flood=2:{kind}; exit", wait="") as runner:
        assert runner.ended() == 1
        flood = runner.stderr.read_bytes()
    assert 1.9 * (1 << 20) < len(flood) <= 2 << 20
    assert sign in flood
    assert (b"\n" in flood) == (kind in ("lines", "binary", "utf8"))


def test_closes_its_output_and_lives() -> None:
    with Scripted("stdout=before; close@ready=both; stdout@ready=after; stderr@1=lost; tokens=1") as runner:
        assert len(runner.lines()) == 2
        assert runner.stdout.read_text() == "before\n"
        assert runner.stderr.read_text() == ""


def test_stdout_alone_can_be_closed() -> None:
    with Scripted("close=stdout; stdout=lost; stderr=kept; exit=0", wait="") as runner:
        assert runner.ended() == 0
        assert (runner.stdout.read_text(), runner.stderr.read_text()) == ("", "kept\n")


@pytest.mark.parametrize("options", ["", "setsid", "ignore", "setsid+ignore", "setsid+orphan", "nopipes"])
def test_forks_a_grandchild(options: str) -> None:
    with Scripted(f"fork@ready={options}+print; stderr@ready=forked") as runner:
        runner.wait_until(lambda: "forked" in runner.stderr.read_text())
        pid = int(runner.stdout.read_text().removeprefix("grandchild "))
        try:
            assert f"fork {pid}" in runner.record()
            assert (os.getsid(pid) == runner.child.pid) == ("setsid" not in options)
            os.kill(pid, signal.SIGTERM)
            if "ignore" not in options:
                runner.wait_until(lambda: state(pid) in ("", "Z"))
            else:
                assert state(pid) in ("S", "R")
                if sys.platform == "linux":
                    assert Path(f"/proc/{pid}/fd/2").readlink() == runner.stderr
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            runner.child.kill()


@pytest.mark.parametrize(
    ("scenario", "body"),
    [
        ("tokens=1; line@1=not json; finish@1", b'{"content":"t1 "}\nnot json\n'),
        ("tokens=1; line@first=\\x00\\xff; finish@1", b'\x00\xff\n{"content":"t1 "}\n'),
        ("tokens=2; half@1; cut=end", b'{"content":"t1 "}\n{"content":"this line has no e'),
        ("tokens=2; done=no", b'{"content":"t1 "}\n{"content":"t2 "}\n'),
        ("tokens=9; finish@2", b'{"content":"t1 "}\n{"content":"t2 "}\n'),
        ("error@first=no memory", b'{"content": "error: no memory", "done": true}\n'),
        ("truncate=20; cut=end", b'{"content":"t1 "}\n{"'),
    ],
)
def test_odd_answers_that_end_well_formed(scenario: str, body: bytes) -> None:
    with Scripted(scenario) as runner:
        assert runner.post() == (200, body)


def test_big_lines() -> None:
    with Scripted("tokens=1; big@1=3") as runner:
        assert len(runner.lines()[1]["content"]) == 3 << 20


def test_refusal_with_status_and_message() -> None:
    with Scripted("status=418:I am a teapot") as runner:
        assert runner.post() == (418, b"I am a teapot")
        runner.wait_until(lambda: "over 1" in runner.record())
    with Scripted('status=400:{"error":"bad size"}') as runner:
        assert runner.post() == (400, b'{"error":"bad size"}')


@pytest.mark.parametrize("how", ["close", "reset", "crash"])
@pytest.mark.parametrize("limit", [0, 5, 18, 19])
def test_truncated_chunked_answers_have_no_terminator(how: str, limit: int) -> None:
    with Scripted(f"truncate={limit}; cut={how}; stderr@crash=bye") as runner:
        connection = runner.connection()
        connection.request("POST", "/completion", b"{}")
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)) as caught:
            connection.getresponse().read()
        if isinstance(caught.value, http.client.IncompleteRead):
            assert len(caught.value.partial) <= limit
        connection.close()
        if how == "crash":
            assert runner.ended() == -signal.SIGKILL
            assert runner.stderr.read_text() == "bye\n"


def test_http_1_0_ends_with_its_connection_at_every_offset() -> None:
    with Scripted("http=1.0; tokens=1") as runner:
        whole = drained(runner.raw(POST))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert b"Content-Length" not in head
    assert b"Transfer-Encoding" not in head
    for limit in (0, 1, 17, len(body) - 1):
        with Scripted(f"http=1.0; tokens=1; truncate={limit}") as runner:
            assert drained(runner.raw(POST)) == head + b"\r\n\r\n" + body[:limit]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_split_writes_send_the_same_bytes(size: int) -> None:
    with Scripted("tokens=2") as runner:
        whole = runner.post()
    with Scripted(f"tokens=2; split={size}; pause=0.0002") as runner:
        assert runner.post() == whole


def test_each_answer_can_be_cut_or_split_differently() -> None:
    with Scripted("http=1.0; tokens=1; truncate=each") as runner:
        for size in range(5):
            assert drained(runner.raw(POST)).partition(b"\r\n\r\n")[2] == b'{"content"'[:size]
    with Scripted("tokens=1; split=each") as runner:
        assert [len(runner.lines()) for _ in range(4)] == [2] * 4


def test_once_misbehaves_in_the_first_life_only() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scenario = f"once={folder}/done; exit@start=4; tokens=1"
        with Scripted(scenario, wait="") as runner:
            assert runner.ended() == 4
        with Scripted(scenario) as runner:
            assert len(runner.lines()) == 2


def test_bind_and_ready_can_be_delayed() -> None:
    with Scripted("bind=0.1; load=0.1", wait="") as runner:
        runner.wait_until(lambda: runner.record()[-1:] == ["ready"])
        assert runner.record() == [f"start {runner.child.pid}", "listening", "ready"]


def test_unknown_words_are_refused() -> None:
    with Scripted("tokens=1; explode@3", wait="") as runner:
        assert runner.ended() == 1
        assert "unknown word in the scenario: 'explode@3'" in runner.stderr.read_text()


def test_braces_of_a_scenario_are_no_placeholders() -> None:
    command = fake_runner('line@1={"port":"{port}"}')["command"]
    assert sum("{port}" in word for word in command) == 0


def test_keys_go_into_the_entry() -> None:
    entry = fake_runner("", address="tcp", announce=True, keep_alive="1s")
    assert entry["keep_alive"] == "1s"
    assert {"{port}", "{ready_fd}", "{model}"} <= set(entry["command"])
    assert entry["engine"] == "command"
