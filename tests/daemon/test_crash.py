"""A supervisor that crashes takes its daemon with it, loudly: a daemon that can do nothing must not look alive."""

from __future__ import annotations

import http.client
import socket
import threading
from pathlib import Path

import pytest

from mlxsup.config import parse
from mlxsup.daemon.server import serve
from mlxsup.engines import KEYS
from mlxsup.registry import Registry
from mlxsup.testing import fake_runner


def _load(path: str, answers: list[int]) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    while True:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        try:
            connection.sock.connect(path)
            break
        except OSError:
            connection.sock.close()
    connection.request("POST", "/models/load", b'{"model": "m"}')
    answers.append(connection.getresponse().status)
    connection.close()


@pytest.mark.usefixtures("log_as_before")
def test_the_daemon_ends_and_raises_what_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Registry, "_carry_out", crash)
    path = str(tmp_path / "s")
    answers: list[int] = []
    client = threading.Thread(target=_load, args=(path, answers))
    client.start()
    settings = parse({"server": {"listen": [f"unix:{path}"]}, "models": {"m": fake_runner()}}, KEYS)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - alone or in a group, either will do
        serve(settings, lambda: settings)
    client.join(10)
    assert answers == [503]
    raised = caught.value
    while isinstance(raised, BaseExceptionGroup):
        raised = raised.exceptions[0]
    assert isinstance(raised, ZeroDivisionError)
