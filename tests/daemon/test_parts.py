"""The daemon's parts by themselves: addresses, sockets, signals, sd_notify and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
import structlog
from aiohttp.http_exceptions import BadHttpMessage

from mlxsup.config import parse_listen
from mlxsup.daemon import logging as daemon_logging
from mlxsup.daemon.addresses import is_local, local_url, written
from mlxsup.daemon.listen import listening
from mlxsup.daemon.signals import captured
from mlxsup.daemon.systemd import notify, watchdog_limit
from mlxsup.errors import ConfigError, Conflict

LIMIT = 10.0


@pytest.mark.parametrize(
    ("text", "url", "local"),
    [
        ("127.0.0.1:11435", "http://127.0.0.1:11435", True),
        ("localhost:80", "http://localhost:80", True),
        ("[::1]:80", "http://[::1]:80", True),
        ("0.0.0.0:80", "http://127.0.0.1:80", False),
        ("[::]:80", "http://[::1]:80", False),
        ("192.168.1.2:80", "http://192.168.1.2:80", False),
        ("unix:/run/x", "unix:/run/x", True),
    ],
)
def test_an_address_is_written_as_it_was_read_and_reached_from_this_machine(text: str, url: str, local: bool) -> None:
    address = parse_listen(text)
    assert written(address) == text
    assert local_url(address) == url
    assert is_local(address) is local


@pytest.mark.anyio
async def test_all_addresses_are_open_or_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        path = tmp_path / "s"
        with pytest.raises(Conflict, match=f"{taken} is taken by another program"):
            async with listening([f"unix:{path}", taken]):
                pass
        assert not path.exists()
    async with listening([f"unix:{path}", "127.0.0.1:0", "localhost:0"]) as sockets:
        assert [sock.family for sock in sockets[:2]] == [socket.AF_UNIX, socket.AF_INET]
        assert len(sockets) >= 3
        assert not any(sock.get_inheritable() for sock in sockets)


@pytest.mark.anyio
async def test_all_addresses_beside_one_of_them_is_a_mistake_of_the_list() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Conflict, match=f"0.0.0.0:{port} is taken by another program"):
            async with listening([f"[::1]:{port}", f"0.0.0.0:{port}"]):
                pass
    with pytest.raises(ConfigError, match="another address of the list is a part of it"):
        async with listening([f"127.0.0.1:{port}", f"0.0.0.0:{port}"]):
            pass


@pytest.mark.anyio
async def test_a_file_in_the_way_of_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("words")
    with pytest.raises(ConfigError, match="a file that is no socket is in the way"):
        async with listening([f"unix:{path}"]):
            pass
    assert path.read_text() == "words"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("unix:/no/such/folder/s", "No such file"),
        ("no-such-host.invalid:1", "cannot listen on no-such-host.invalid:1"),
        ("192.0.2.1:1", "Cannot assign|can't assign"),
    ],
)
async def test_an_address_that_cannot_be_opened_is_named(address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        async with listening([address]):
            pass


@pytest.mark.anyio
async def test_what_is_listed_twice_is_opened_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    twice = [f"127.0.0.1:{port}", f"127.0.0.1:{port}", f"unix:{tmp_path}/s", f"unix:{tmp_path}/s"]
    async with listening(twice) as sockets:
        assert [sock.getsockname() for sock in sockets] == [("127.0.0.1", port), f"{tmp_path}/s"]
    async with listening([f"localhost:{port}", f"127.0.0.1:{port}"]) as sockets:
        assert [sock.getsockname()[0] for sock in sockets].count("127.0.0.1") == 1
    async with listening(["127.0.0.1:0", "127.0.0.1:0"]) as sockets:
        assert len({sock.getsockname()[1] for sock in sockets}) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("order", [1, -1])
async def test_of_a_name_the_addresses_that_this_machine_has_are_taken(
    monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[::order])
    async with listening(["box:0"]) as sockets:
        assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1"]
    del found[1]
    with pytest.raises(ConfigError, match=r"cannot listen on box:0: .*(address|protocol)"):
        async with listening(["box:0"]):
            pass


@pytest.mark.anyio
@pytest.mark.skipif(sys.platform == "darwin", reason="a lock keeps others from it there")
async def test_a_socket_that_another_daemon_made_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with listening([f"unix:{path}"]):
        path.unlink()
        async with listening([f"unix:{path}"]):
            inode = path.stat().st_ino
            (tmp_path / "keep").hardlink_to(path)
    assert (tmp_path / "keep").stat().st_ino == inode


@pytest.mark.anyio
async def test_signals_are_counted_and_the_handlers_of_before_put_back() -> None:
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    mine: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: mine.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    heard: list[tuple[signal.Signals, int]] = []
    more = asyncio.Event()

    def on_signal(which: signal.Signals, count: int) -> None:
        heard.append((which, count))
        more.set()

    try:
        with captured(on_signal):
            for _ in range(2):
                more.clear()
                os.kill(os.getpid(), signal.SIGTERM)
                with anyio.fail_after(LIMIT):
                    await more.wait()
        assert heard == [(signal.SIGTERM, 1), (signal.SIGTERM, 2)]
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) == before[1]
        assert mine == []
    finally:
        signal.signal(signal.SIGTERM, before[0])


@pytest.mark.anyio
async def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with captured(lambda *_: None):
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.lowlevel.checkpoint()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("abstract", [False, pytest.param(True, marks=pytest.mark.skipif("sys.platform != 'linux'"))])
def test_the_service_manager_hears_of_it(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@mlxsup-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("place", ["", "/no/such/socket", "vsock:1"])
def test_no_service_manager_is_no_error(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", place)
    notify("READY=1")


@pytest.mark.parametrize(
    ("limit", "pid", "seconds"),
    [
        *(("30000000", "", 30.0), ("500000", "ours", 0.5)),
        *(("30000000", "1", 0.0), ("", "", 0.0), ("soon", "", 0.0), ("-1", "", 0.0), ("\N{SUPERSCRIPT TWO}", "", 0.0)),
    ],
)
def test_a_watchdog_is_heard_of_only_by_the_process_it_is_for(
    limit: str, pid: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WATCHDOG_USEC": limit, "WATCHDOG_PID": pid.replace("ours", str(os.getpid()))}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert watchdog_limit() == seconds


def logged(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def log(tmp_path: Path, log_as_before: None) -> Iterator[Path]:
    """The daemon's log, in a file."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        daemon_logging.configure(file.fileno())
        yield path


def test_the_log_is_json_unless_somebody_looks(log: Path) -> None:
    logging.getLogger("mlxsup.x").info("loaded %s", "m", extra={"model": "m", "path": Path("/m")})
    structlog.get_logger("mlxsup.y").warning("odd", pid=3)
    logging.getLogger("mlxsup.x").debug("quiet")
    logging.getLogger("aiohttp.server").info("quiet")
    first, second = (json.loads(line) for line in logged(log))
    assert (first["event"], first["level"], first["logger"]) == ("loaded m", "info", "mlxsup.x")
    assert (first["model"], first["path"]) == ("m", "/m")
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"], second["pid"]) == ("odd", "warning", 3)


def test_a_traceback_is_part_of_its_line(log: Path) -> None:
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        logging.getLogger("mlxsup.x").exception("failed")
    line = json.loads(log.read_text())
    assert "ZeroDivisionError: why" in line["exception"]


def test_http_that_is_none_does_not_fill_the_log(log: Path) -> None:
    for error in (BadHttpMessage("garbage"), ZeroDivisionError("ours")):
        logging.getLogger("aiohttp.server").error("Error handling request", exc_info=error)
    (line,) = logged(log)
    assert "ZeroDivisionError" in line


@pytest.mark.usefixtures("log_as_before")
def test_a_terminal_gets_lines_for_people() -> None:
    reader, terminal = os.openpty()
    try:
        daemon_logging.configure(terminal)
        logging.getLogger("mlxsup.x").info("loaded", extra={"model": "m"})
        logging.getLogger("other").warning("careful")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("odd", stacklevel=1)
        text = ""
        while "odd" not in text:
            text += os.read(reader, 10_000).decode()
    finally:
        os.close(reader)
        os.close(terminal)
    assert "loaded" in text
    assert "model" in text
    assert "careful" in text
    assert "odd" in text
    assert not text.startswith("{")


@pytest.mark.usefixtures("log_as_before")
def test_without_a_stderr_nothing_is_written_to_what_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setattr(daemon_logging, "STDERR", writer)
    monkeypatch.setattr("sys.stderr", None)
    try:
        daemon_logging.configure(writer)
        logging.getLogger("mlxsup.x").warning("careful")
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)
