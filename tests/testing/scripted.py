"""A fake runner started by hand, without a supervisor, for the tests of the fake runner itself."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlxsup.testing import fake_runner

LIMIT = 10.0


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT)
        self._path = path

    def connect(self) -> None:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.settimeout(LIMIT)
            made.connect(self._path)
        except OSError:
            made.close()
            raise
        self.sock = made


class Scripted:
    """One fake runner. `wait` is what must be in its record first: one that never loads is never ready."""

    def __init__(self, scenario: str = "", *, tcp: bool = False, wait: str = "ready") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fake-")
        self.folder = Path(self._folder.name)
        self.socket = str(self.folder / "s")
        self.port = _free_port() if tcp else 0
        entry = fake_runner(f"record={self.folder / 'record'}; {scenario}", address="tcp" if tcp else "unix")
        filled = {"{socket}": self.socket, "{port}": str(self.port), "{model}": "m"}
        self.stdout, self.stderr = self.folder / "stdout", self.folder / "stderr"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.child = subprocess.Popen(
                [filled.get(word, word) for word in entry["command"]], stdout=out, stderr=err, start_new_session=True
            )
        if wait:
            self.wait_until(lambda: wait in self.record())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._folder.cleanup()

    def connection(self) -> http.client.HTTPConnection:
        if self.port:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        return UnixConnection(self.socket)

    def raw(self, request: bytes) -> socket.socket:
        connection = self.connection()
        connection.connect()
        assert isinstance(connection.sock, socket.socket)
        connection.sock.sendall(request)
        return connection.sock

    def get(self, path: str = "/health") -> tuple[int, dict[str, Any]]:
        connection = self.connection()
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, json.loads(body)

    def post(self, **fields: Any) -> tuple[int, bytes]:
        connection = self.connection()
        connection.request("POST", "/completion", json.dumps({"prompt": "p", **fields}))
        answer = connection.getresponse()
        try:
            return answer.status, answer.read()
        finally:
            connection.close()

    def lines(self, **fields: Any) -> list[dict[str, Any]]:
        status, body = self.post(**fields)
        assert status == 200
        return [json.loads(line) for line in body.splitlines()]

    def record(self) -> list[str]:
        path = self.folder / "record"
        return path.read_text().splitlines() if path.exists() else []

    def ended(self) -> int:
        return self.child.wait(LIMIT)

    def wait_until(self, true: Any) -> None:
        limit = time.monotonic() + LIMIT
        while not true():
            assert time.monotonic() < limit, f"not within {LIMIT} s; {self.stderr.read_text()}"
            assert self.child.poll() is None or true(), f"it ended: {self.stderr.read_text()}"
            time.sleep(0.005)


class SyncGate:
    """A gate for tests without an event loop."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "gate")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._listener.settimeout(LIMIT)

    def arrival(self) -> tuple[str, socket.socket]:
        connection, _ = self._listener.accept()
        connection.settimeout(LIMIT)
        return connection.makefile("r").readline().strip(), connection

    def close(self) -> None:
        self._listener.close()


def state(pid: int) -> str:
    """The state letter of a process, "" when it is gone."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
