"""Where a runner listens, and who it is that listens there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxsup.engines import Address
from mlxsup.runners import procfs
from mlxsup.runners.addresses import AddressBook
from mlxsup.runners.listener import Owner, owner
from mlxsup.runners.marks import MARK
from tests.waiting import LIMIT

from .children import LINUX, new_mark

LISTEN = """
import os, signal, socket, sys
share, port, how, family = sys.argv[1] == "share", int(sys.argv[2]), sys.argv[3], sys.argv[4]
def listen():
    it = socket.socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
    if share:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    it.bind(("::1" if family == "6" else "127.0.0.1", port))
    it.listen()
    os.write(1, b"up\\n")
    signal.pause()
if how != "self" and os.fork():
    signal.pause()
if how == "setsid":
    os.setsid()
try:
    listen()
except OSError as error:
    os.write(1, b"%d\\n" % error.errno)
"""

Start = Callable[..., tuple[subprocess.Popen[bytes], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program that listens: itself, by a child, or by a child with a session of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(port: int, how: str = "self", mark: str = "", family: str = "4", share: bool = True) -> object:
        argv = [sys.executable, "-I", "-S", "-c", LISTEN, "share" if share else "", str(port), how, family]
        env = {"PATH": os.environ["PATH"], MARK: mark or new_mark()}
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().decode().strip()

    yield start_one  # type: ignore[misc]
    for process in started:
        for child in procfs.children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait(LIMIT)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def book(tmp_path: Path) -> AddressBook:
    return AddressBook(lambda: tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestPlaces:
    def test_a_socket_is_in_the_private_folder_and_nobody_elses(self, book: AddressBook, tmp_path: Path) -> None:
        with book.place("m", "unix") as one, book.place("m", "unix") as other:
            assert Path(one.address.socket).parent == tmp_path
            assert one.address != other.address
            assert one.address.transport == "unix"
            assert not one.held

    def test_a_port_is_nobody_elses(self, book: AddressBook) -> None:
        with book.place("m", "tcp") as one, book.place("m", "tcp") as other:
            assert one.address.transport == "tcp"
            assert 0 < one.address.port != other.address.port

    @pytest.mark.skipif(not LINUX, reason="ports are held on Linux only")
    def test_a_held_port_lets_in_who_shares_and_keeps_out_who_does_not(self, book: AddressBook, start: Start) -> None:
        with book.place("m", "tcp") as place:
            assert place.held
            assert start(place.address.port, share=False)[1].isdigit()
            assert start(place.address.port)[1] == "up"
            with socket.create_connection(("127.0.0.1", place.address.port), LIMIT):
                pass  # it came to the one who listens, not to the one who holds

    @pytest.mark.skipif(not LINUX, reason="ports are held on Linux only")
    def test_the_hold_ends_with_the_load(self, book: AddressBook, start: Start) -> None:
        with book.place("m", "tcp") as place:
            pass
        assert start(place.address.port, share=False)[1] == "up"

    def test_a_program_that_shares_nothing_gets_ports_that_are_not_held(self, book: AddressBook, start: Start) -> None:
        book.refuse_hold("m")
        with book.place("m", "tcp") as place, book.place("other", "tcp") as other:
            assert not place.held
            assert other.held is LINUX
            assert start(place.address.port, share=False)[1] == "up"

    def test_what_a_dead_runner_left_is_removed(self, book: AddressBook, tmp_path: Path) -> None:
        address = Address(socket=str(tmp_path / "1.sock"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address.socket)
        book.forget(address)
        book.forget(address)
        book.forget(Address(port=1))
        assert list(tmp_path.iterdir()) == []


class TestAddress:
    def test_a_port(self) -> None:
        address = Address(port=8080)
        assert (str(address), address.base_url) == ("127.0.0.1:8080", "http://127.0.0.1:8080")

    def test_a_socket(self) -> None:
        address = Address(socket="/run/x.sock")
        assert (str(address), address.base_url) == ("unix:/run/x.sock", "http://localhost")


class TestOwner:
    @pytest.mark.parametrize(
        "how", ["self", "fork", pytest.param("setsid", marks=pytest.mark.skipif(not LINUX, reason=""))]
    )
    def test_ours(self, start: Start, how: str) -> None:
        port, mark = free_port(), new_mark()
        process, told = start(port, how, mark)
        assert told == "up"
        assert owner(Address(port=port), process.pid, mark) is Owner.OURS

    @pytest.mark.skipif(not LINUX, reason="finds it by its mark")
    def test_ours_though_nothing_but_its_mark_tells(self, start: Start) -> None:
        """A grandchild in a session of its own, whose parent is gone."""
        port, mark = free_port(), new_mark()
        start(port, "self", f"{mark}.1")
        sleeper, _ = start(free_port())
        assert owner(Address(port=port), sleeper.pid, mark) is Owner.OURS

    @pytest.mark.skipif(not LINUX, reason="a Mac shows the connections of others to root only")
    @pytest.mark.parametrize("how", ["self", "fork"])
    def test_a_strangers(self, start: Start, how: str) -> None:
        port, mark = free_port(), new_mark()
        start(port, how)
        process, _ = start(free_port(), mark=mark)
        assert owner(Address(port=port), process.pid, mark) is Owner.STRANGER

    @pytest.mark.skipif(not LINUX, reason="see above")
    def test_this_program_is_a_stranger_too(self, start: Start) -> None:
        process, _ = start(free_port(), mark="m")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            assert owner(Address(port=port), process.pid, "m") is Owner.STRANGER

    def test_nobodys(self, start: Start) -> None:
        process, _ = start(free_port())
        assert owner(Address(port=free_port()), process.pid, "no-mark") is Owner.UNKNOWN

    def test_of_one_who_is_gone(self) -> None:
        assert owner(Address(port=free_port()), 2**22 + 5, "no-mark") is Owner.UNKNOWN

    @pytest.mark.skipif(not LINUX, reason="a Mac shows the connections of others to root only")
    def test_what_we_may_not_see_is_unknown(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another user's program listens, and our child does not: whose the socket is, only root could tell."""
        port = free_port()
        process, _ = start(port)
        sleeper, _ = start(free_port())
        see = procfs.holds_socket
        monkeypatch.setattr(procfs, "holds_socket", lambda pid, inodes: pid != process.pid and see(pid, inodes))
        assert owner(Address(port=port), sleeper.pid, "no-mark") is Owner.UNKNOWN

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
    def test_on_the_other_loopback(self, start: Start) -> None:
        port, mark = free_port(), new_mark()
        process, told = start(port, "self", mark, "6")
        if told != "up":
            pytest.skip("no IPv6 here")
        assert owner(Address(host="::1", port=port), process.pid, mark) is Owner.OURS

    def test_an_outgoing_connection_is_no_listener(self, start: Start) -> None:
        """The client's own port may be any number, that of a runner too."""
        port, mark = free_port(), new_mark()
        process, _ = start(port, mark=mark)
        with socket.create_connection(("127.0.0.1", port), LIMIT) as client:
            assert owner(Address(port=client.getsockname()[1]), process.pid, mark) is Owner.UNKNOWN

    def test_without_proc(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a Mac: our own are found, and so are others of this user."""
        monkeypatch.setattr(procfs, "AVAILABLE", False)
        port, mark = free_port(), new_mark()
        process, _ = start(port, mark=mark)
        other, _ = start(free_port())
        assert owner(Address(port=port), process.pid, mark) is Owner.OURS
        assert owner(Address(port=port), other.pid, "no-mark") is Owner.STRANGER
