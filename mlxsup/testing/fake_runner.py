"""A scripted runner: one program of the standard library alone that speaks the NDJSON wire and fails as it is told.

    python -I fake_runner.py (--socket PATH | --port N) [--model M] --scenario "load=0.2; tokens=5; crash@3"

It is run by its path and never imported, so that it starts fast. `mlxsup.testing` describes the words of a scenario.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

SETTINGS = """load loading progress tokens steps image delay done status health http truncate cut split pause ignore
    ignore-gone reuse record once"""
MIB = 1 << 20


class Gone(Exception):
    """The client has left."""


class Over(Gone):
    """The answer ends here on purpose, and its connection with it."""


def unescape(value: str) -> bytes:
    return value.encode().decode("unicode_escape").encode("latin-1")


class Scenario:
    """A parsed scenario: settings by name, actions by phase."""

    def __init__(self, text: str) -> None:
        self.settings: dict[str, str] = {}
        self.actions: dict[str, list[tuple[str, str]]] = {}
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            head, _, value = part.partition("=")
            name, at, phase = (word.strip() for word in head.partition("@"))
            if name == "bind" and not at:
                name, at, phase = "delay", "@", "bind"
            if name in SETTINGS.split() and not at:
                self.settings[name] = value.strip()
            elif name in ("hang", "delay", *ANSWERING) or hasattr(FakeRunner, "do_" + name):
                self.actions.setdefault(phase or "start", []).append((name, value.strip()))
            else:
                sys.exit(f"fake_runner: unknown word in the scenario: {part!r}")
        once = self.text("once")
        if once and os.path.exists(once):
            self.actions.clear()
        elif once:
            os.close(os.open(once, os.O_CREAT | os.O_WRONLY))

    def text(self, name: str) -> str:
        return self.settings.get(name, "")

    def number(self, name: str, default: float = 0) -> float:
        return float(self.settings.get(name, default))


class Exchange:
    """One HTTP request on one connection, and the writing of its answer."""

    def __init__(self, connection: socket.socket, scenario: Scenario, crash: Callable[[str], None]) -> None:
        self.connection, self.scenario, self.crash = connection, scenario, crash
        self.number = self.sent = 0
        self.path, self.body, self.chunked = "", b"", False

    def read(self, reader: BinaryIO) -> bool:
        """Read one request; False when the client closed instead."""
        line = reader.readline().decode("latin-1")
        if not line.endswith("\n"):
            return False
        self.path = line.split()[1]
        length = 0
        while line.strip():
            line = reader.readline().decode("latin-1").lower()
            if line.startswith("content-length:"):
                length = int(line.partition(":")[2])
        self.body = reader.read(length)
        return len(self.body) == length

    def asked(self, name: str) -> int | None:
        """Return a number out of the request's body, if it is there."""
        try:
            return int(json.loads(self.body)[name])
        except (ValueError, KeyError, TypeError):
            return None

    def watch(self, seconds: float | None, other: socket.socket | None = None) -> None:
        """Wait for a time or for another socket, but no longer than the client stays."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            watched = [self.connection] if "ignore-gone" not in self.scenario.settings else []
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            found, _, _ = select.select([*watched, *([other] if other else [])], [], [], left)
            if self.connection in found and self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise Gone
            if not found or other in found or left == 0.0:
                return
            time.sleep(0.001)  # the client has written ahead: it has not left

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.head(status, kind, length=len(body))
        self.write(body)

    def head(self, status: int, kind: str, length: int | None = None) -> None:
        old = self.scenario.text("http") == "1.0"
        self.chunked = length is None and not old
        framing = (
            "Transfer-Encoding: chunked\r\n" if self.chunked else f"Content-Length: {length}\r\n" * (length is not None)
        )
        version = "1.0" if old else "1.1"
        self.write(f"HTTP/{version} {status} Scripted\r\nContent-Type: {kind}\r\n{framing}\r\n".encode())

    def send(self, data: bytes) -> None:
        """Write a part of the answer's body, broken off where the scenario says."""
        limit = self.scenario.text("truncate")
        part = data[: max(0, (self.number - 1 if limit == "each" else int(limit)) - self.sent)] if limit else data
        self.sent += len(part)
        broken = len(part) < len(data)
        if not self.chunked:
            self.write(part)
        elif broken and self.scenario.text("cut") != "end":
            self.write(b"%x\r\n%b" % (len(data), part))
        elif part:
            self.write(b"%x\r\n%b\r\n" % (len(part), part))
        if broken:
            self.break_off()

    def end(self) -> None:
        if self.chunked:
            self.write(b"0\r\n\r\n")

    def break_off(self) -> NoReturn:
        how = self.scenario.text("cut")
        if how == "crash":
            self.crash("")
        elif how == "hang":
            self.watch(None)
        elif how == "end":
            self.end()
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Over

    def write(self, data: bytes) -> None:
        split, pause = self.scenario.text("split"), self.scenario.number("pause")
        size = (self.number if split == "each" else int(split or 0)) or len(data)
        for start in range(0, len(data), size or 1):
            if pause and start:
                time.sleep(pause)
            try:
                self.connection.sendall(data[start : start + size])
            except OSError:
                if "ignore-gone" not in self.scenario.settings:
                    raise Gone from None


class FakeRunner:
    """The process: its life from start to signal, and what it does in each phase."""

    def __init__(self, scenario: Scenario, options: dict[str, str]) -> None:
        self.scenario, self.options = scenario, options
        self.began = time.monotonic()
        self.ready, self.wedged = threading.Event(), threading.Event()
        self.loaded, self.probes, self.requests, self.busy = False, 0, 0, 0
        self.kept: list[bytearray] = []
        self.woken, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
        self.lock = threading.Lock()
        path = scenario.text("record")
        self.log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600) if path else -1

    def live(self) -> None:
        """Go through the phases of a runner and wait for a signal."""
        self.record(f"start {os.getpid()}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.enter("start")
        self.enter("bind")
        listener = self.listen()
        self.record("listening")
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # threads leave them to this one
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        self.enter("loading")
        self.load()
        if "ready-fd" in self.options:
            os.write(int(self.options["ready-fd"]), b"1")
        self.record("ready")
        self.enter("ready")
        self.rest(None)

    def load(self) -> None:
        self.began = time.monotonic()
        self.rest(None if self.scenario.text("load") == "forever" else self.scenario.number("load"))
        self.loaded = True
        if not self.scenario.number("loading"):
            self.ready.set()
        while not self.ready.is_set():
            self.rest(0.01)

    def rest(self, seconds: float | None, other: socket.socket | None = None) -> None:
        """Wait for a time or a socket, with signals handled at once (signal.pause() would miss one just before it)."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            found, _, _ = select.select([self.woken, *([other] if other else [])], [], [], left)
            if self.woken in found:
                self.woken.recv(64)
            if other in found:
                return

    def on_signal(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        self.record(f"signal {name}")
        self.enter(name.lower())
        if name not in self.scenario.text("ignore").split("+"):
            os._exit(0)

    def listen(self) -> socket.socket:
        path = self.options.get("socket")
        listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        if path:
            listener.bind(path)
        else:
            if self.scenario.text("reuse") != "none":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", int(self.options["port"])))
        listener.listen(512)
        return listener

    def accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            if connection.family == socket.AF_INET:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(Gone, OSError), connection, connection.makefile("rb") as reader:
            while (exchange := Exchange(connection, self.scenario, self.do_crash)).read(reader):
                if exchange.path == "/completion":
                    self.completion(exchange)
                elif exchange.path == "/health":
                    self.health(exchange)
                else:
                    exchange.answer(404, b'{"error":"no such path"}')
                if self.scenario.text("http") == "1.0":
                    return

    def health(self, exchange: Exchange) -> None:
        body: dict[str, object]
        if self.wedged.is_set():
            exchange.watch(None)
        if self.ready.is_set():
            told = self.scenario.text("health")
            if told:
                self.refuse(exchange, told)
            used = sum(map(len, self.kept))
            body = {"status": "ok", "pid": os.getpid(), "model": self.options.get("model", ""), "busy": self.busy > 0}
            exchange.answer(200, json.dumps({**body, "memory": {"active": used, "peak": used, "cache": 0}}).encode())
            return
        body = {"status": "loading"}
        if self.scenario.text("progress") != "none":
            body["progress"] = self.progress()
        with self.lock:
            self.probes += 1
            if self.loaded and self.probes >= self.scenario.number("loading"):
                self.ready.set()  # the next one is told 200
        exchange.answer(503, json.dumps(body).encode())

    def progress(self) -> float:
        seconds = self.scenario.text("load")
        if self.scenario.text("progress"):
            return self.scenario.number("progress")
        if self.scenario.number("loading"):
            return self.probes / self.scenario.number("loading")
        elapsed = time.monotonic() - self.began
        return 0.0 if seconds in ("", "forever") else min(1.0, elapsed / float(seconds))

    def refuse(self, exchange: Exchange, told: str) -> NoReturn:
        status, _, text = told.partition(":")
        body = unescape(text) or b'{"error":"scripted refusal"}'
        exchange.answer(int(status), body, "application/json" if body.startswith(b"{") else "text/plain")
        raise Over

    def completion(self, exchange: Exchange) -> None:
        with self.lock:
            self.requests += 1
            self.busy += 1
            exchange.number = self.requests
        self.record(f"request {exchange.number} {exchange.body[:65536].decode('utf-8', 'replace')}")
        try:
            self.enter("request", exchange)
            if not self.ready.is_set():
                self.refuse(exchange, '503:{"error":"loading"}')
            if self.scenario.text("status"):
                self.refuse(exchange, self.scenario.text("status"))
            exchange.head(200, "application/x-ndjson")
            self.enter("first", exchange)
            for number, line in enumerate(self.lines(exchange), 1):
                exchange.watch(self.scenario.number("delay"))
                exchange.send(line)
                self.enter(str(number), exchange)
            self.enter("final", exchange)
            if self.scenario.text("done") != "no":
                exchange.send(self.final(exchange))
            with contextlib.suppress(Gone):  # who has read the last line may leave before the end of the body
                exchange.end()
            self.record(f"done {exchange.number}")
            self.enter("end", exchange)
        except (Gone, OSError) as error:
            self.record(f"{'over' if isinstance(error, Over) else 'gone'} {exchange.number}")
            raise
        finally:
            with self.lock:
                self.busy -= 1

    def lines(self, exchange: Exchange) -> Iterator[bytes]:
        if {"steps", "image"} & self.scenario.settings.keys():
            total = int(self.scenario.number("steps") or exchange.asked("steps") or 4)
            yield from (b'{"step":%d,"total":%d}\n' % (step, total) for step in range(total + 1))
        else:
            yield from (b'{"content":"t%d "}\n' % (n + 1) for n in range(int(self.scenario.number("tokens", 3))))

    def final(self, exchange: Exchange) -> bytes:
        told: dict[str, object] = {"done": True, "stop_reason": "stop", "seed": exchange.asked("seed")}
        told |= {"prompt_eval_count": 1, "prompt_eval_duration": 1000, "eval_count": 3, "eval_duration": 3000}
        line = json.dumps({name: value for name, value in told.items() if value is not None}).encode()
        size = int(self.scenario.number("image"))
        if not size:
            return line + b"\n"
        picture = (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * (size // 256 + 1))[:size]
        return b'{"image":"%b",%b\n' % (binascii.b2a_base64(picture, newline=False), line[1:])

    def enter(self, phase: str, exchange: Exchange | None = None) -> None:
        """Do what the scenario says for a phase."""
        actions = list(self.scenario.actions.get(phase, ()))
        if exchange is not None:
            actions += self.scenario.actions.get(f"{phase}#{exchange.number}", ())
        wait = exchange.watch if exchange is not None else self.rest
        for name, value in actions:
            if name == "gate":
                self.do_gate(value, phase, wait)
            elif name in ("hang", "delay"):
                wait(float(value) if name == "delay" else None)
            elif name not in ANSWERING:
                getattr(self, "do_" + name)(value)
            elif exchange is not None:
                ANSWERING[name](exchange, value)
            else:
                sys.exit(f"fake_runner: {name} has no place in phase {phase}")

    def do_gate(self, path: str, phase: str, wait: Callable[[None, socket.socket], None]) -> None:
        with socket.socket(socket.AF_UNIX) as gate:
            try:
                gate.connect(path)
                gate.sendall(phase.encode() + b"\n")
            except OSError as error:
                put(2, f"fake_runner: nobody keeps the gate {path}: {error}\n".encode())
                os._exit(70)
            wait(None, gate)

    def do_exit(self, value: str) -> None:
        self.enter("crash")
        os._exit(int(value or 1))

    def do_crash(self, value: str) -> None:
        self.enter("crash")
        signal.raise_signal(signal.Signals[value or "SIGKILL"])  # to this thread: it does nothing more

    def do_freeze(self, _value: str) -> None:
        signal.raise_signal(signal.SIGSTOP)

    def do_wedge(self, _value: str) -> None:
        self.wedged.set()

    def do_stderr(self, value: str) -> None:
        put(2, unescape(value) + b"\n")

    def do_stdout(self, value: str) -> None:
        put(1, unescape(value) + b"\n")

    def do_flood(self, value: str) -> None:
        size, _, kind = value.partition(":")
        block, total = FLOODS[kind or "plain"], int(float(size or 1) * MIB)
        for start in range(0, total, len(block)):
            put(2, block[: total - start])

    def do_close(self, value: str) -> None:
        null = os.open(os.devnull, os.O_WRONLY)  # the numbers stay taken, or a connection would get them
        for name, number in (("stdout", 1), ("stderr", 2)):
            if value in (name, "both", ""):
                os.dup2(null, number)

    def do_alloc(self, value: str) -> None:
        self.kept.append(bytearray(b"\1") * int(float(value or 1) * MIB))

    def do_fork(self, value: str) -> None:
        options = value.split("+")
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forking beside threads is safe for a child that only waits
            child = os.fork()
        if not child:
            if "orphan" in options and os.fork():
                os._exit(0)
            grandchild(options, writing)
        os.close(writing)
        pid = int(os.read(reading, 32))
        os.close(reading)
        if "orphan" in options:
            os.waitpid(child, 0)
        if "print" in options:
            put(1, b"grandchild %d\n" % pid)
        self.record(f"fork {pid}")

    def record(self, line: str) -> None:
        if self.log >= 0:
            os.write(self.log, line.encode() + b"\n")


def grandchild(options: list[str], told: int) -> NoReturn:
    """Live in the forked child: hold the pipes and wait; `told` gets the pid once all is set up."""
    how: signal.Handlers = signal.SIG_IGN if "ignore" in options else signal.SIG_DFL
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, how)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if "setsid" in options:
        os.setsid()
    os.write(told, b"%d" % os.getpid())
    os.closerange(0 if "nopipes" in options else 3, 1024)
    while True:
        signal.pause()


def put(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        while data:
            data = data[os.write(descriptor, data) :]


def half(exchange: Exchange, _value: str) -> None:
    exchange.send(b'{"content":"this line has no e')
    exchange.break_off()


def error(exchange: Exchange, value: str) -> None:
    text = "error: " + unescape(value or "scripted").decode("utf-8", "replace")
    exchange.send(json.dumps({"content": text, "done": True}).encode() + b"\n")
    finish(exchange, "")


def finish(exchange: Exchange, _value: str) -> None:
    exchange.end()
    raise Over


ANSWERING: dict[str, Callable[[Exchange, str], None]] = {
    "line": lambda exchange, value: exchange.send(unescape(value) + b"\n"),
    "big": lambda exchange, value: exchange.send(b'{"content":"%b"}\n' % (b"x" * int(float(value or 1) * MIB))),
    "cut": lambda exchange, _value: exchange.break_off(),
    "half": half,
    "error": error,
    "finish": finish,
}
FLOODS = {
    "plain": b"x" * 65536,
    "lines": (b"y" * 79 + b"\n") * 819,
    "bars": b"".join(b"%3d%%|%b|\r" % (n, b"#" * n) for n in range(101)) * 10,
    "binary": bytes(range(256)) * 256,
    "utf8": b"\xff\xfe\xc3(\xe2\x82 caf\xe9\n" * 4096,
}


def main() -> None:
    words = iter(sys.argv[1:])
    options = {word.removeprefix("--"): next(words, "") for word in words}
    FakeRunner(Scenario(options.get("scenario", "")), options).live()


if __name__ == "__main__":
    main()
