r"""Help for testing programs that are built on Supervisor: a scripted runner instead of a model, gates and a recorder of
events instead of sleeps.

    from mlxsup.config import parse
    from mlxsup.engines import KEYS
    from mlxsup.testing import fake_runner

    settings = parse({"models": {"broken": fake_runner("load=0.2; tokens=5; crash@3")}}, KEYS)

`fake_runner` makes the model entry; the runner is a real process, a program of the standard library alone that starts in
about 30 ms, speaks the NDJSON wire and fails exactly as its scenario says.

A scenario is a list of settings `name=value` and actions `name@phase=value`, separated by `;`. In texts, escapes such as
`\n`, `\x3b` (a semicolon) or `\xff` stand for bytes. The actions of one phase happen in the order in which they are written.

Phases of the process: `start`, `bind` (before it), `loading` (it listens, and is not ready), `ready`, `sigterm` and `sigint`
(before it obeys), `crash` (just before `exit` or `crash` takes effect). Phases of an answer: `request` (read), `first` (head
sent, no chunk yet), `1`, `2`... (after that chunk), `final` (before the last line), `end`. `3#2` is phase 3 of the second
request only. An action without a phase happens at `start`.

Settings:
    load=S            seconds of loading; the progress grows with them. load=forever: 503 without end
    loading=N         answer 503 to N health requests (after `load`); the progress grows with each
    progress=P        report this progress while loading instead; progress=none: report none
    tokens=N          answer with N pieces of text (default 3): "t1 ", "t2 "...
    steps=N, image=B  answer as an image runner: N step lines after step 0 (default: what was asked for, else 4), and with
                      `image` a picture of B bytes in the last line, the same as `picture(B)`
    delay=S           seconds before each chunk
    done=no           end the answer without its last line
    status=N[:TEXT]   answer N to a completion, with TEXT as its body; health=N[:TEXT]: the same for health, once ready
    http=1.0          answer as HTTP/1.0: the end of the connection is the end of the answer
    truncate=N        break the answer off after N bytes of its body; truncate=each: the nth answer after n-1 bytes
    cut=HOW           how answers break off: close (no terminator; the default), end (well-formed), reset, crash, hang
    split=K           write K bytes at a time; split=each: n bytes in the nth answer; pause=S: with so much time between
    ignore=A+B        do not end on these signals, of SIGTERM and SIGINT
    ignore-gone       go on answering when the client has left
    reuse=none        bind without SO_REUSEADDR and SO_REUSEPORT
    record=PATH       append a line for each notable thing: `start PID`, `listening`, `ready`, `request N BODY`, `done N`,
                      `gone N` (the client left), `over N` (broken off or refused on purpose), `signal NAME`, `fork PID`
    once=PATH         only the first process misbehaves: actions happen if PATH does not exist, and it is made at the start

Actions in any phase:
    exit=CODE         end at once (default 1); crash=SIGNAL: by a signal (default SIGKILL); freeze: SIGSTOP itself
    gate=PATH         wait at this `Gate`; within an answer, no longer than the client stays
    hang              wait for ever, in the same way; delay=S: wait so long. bind=S is delay@bind=S
    wedge             from here on, health requests get no answer
    stderr=TEXT       write a line; stdout=TEXT: the same
    flood=MB[:KIND]   write so much to stderr: plain (without a newline; the default), lines, bars (each ends in \r), binary,
                      utf8 (invalid)
    close=WHICH       close stdout, stderr or both (the default)
    alloc=MB          allocate memory, touch and keep it
    fork=A+B          leave a grandchild that holds the pipes, with any of: setsid, ignore (SIGTERM and SIGINT), nopipes,
                      orphan (its parent ends at once), print (`grandchild PID` on stdout)

Actions in the phases of an answer:
    line=TEXT         send this line as it is; big=MB: a piece of text of that size
    half              send half a line, then break off; cut: break off here
    error=TEXT        end with an in-band error; finish: end well-formed, without a last line
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from mlxsup.testing.events import EventRecorder
from mlxsup.testing.gates import Arrival, Gate

__all__ = ["Arrival", "EventRecorder", "Gate", "fake_runner", "picture"]

_PROGRAM = str(Path(__file__).with_name("fake_runner.py"))


def fake_runner(
    scenario: str = "",
    *,
    address: Literal["unix", "tcp"] = "unix",
    announce: bool = False,
    **keys: Any,
) -> dict[str, Any]:
    """Return a model entry, a plain dict for the configuration, whose runner does what `scenario` says.

    `address` is what the runner listens on. With `announce` it tells at once when it is ready, instead of being asked.
    All other keyword arguments are keys of the entry: `keep_alive="1s"`.
    """
    told = scenario.replace("{", r"\x7b").replace("}", r"\x7d")  # nothing for the engine to fill in
    where = ["--socket", "{socket}"] if address == "unix" else ["--port", "{port}"]
    ready = ["--ready-fd", "{ready_fd}"] if announce else []
    command = [sys.executable, "-I", "-S", _PROGRAM, *where, *ready, "--model", "{model}", "--scenario", told]
    return {"engine": "command", "dialect": "completion", "command": command, "memory": "64MiB", **keys}


def picture(size: int) -> bytes:
    """Return the picture that a fake runner with `image=size` makes: a PNG's first bytes, then every byte value in turn."""
    return (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * (size // 256 + 1))[:size]
