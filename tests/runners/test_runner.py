"""One runner, from nothing to gone: where it listens, how its load ends, and what its failures tell."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup.engines import ENGINES, Address
from mlxsup.engines.base import Transport
from mlxsup.errors import BadAnswer, LoadFailed, LoadTimeout, MlxsupError, RunnerDied, RunnerError, Stalled, Unloaded
from mlxsup.protocol import CompletionRequest
from mlxsup.runners import runner as runner_module
from mlxsup.runners.addresses import AddressBook, Place
from mlxsup.runners.footprint import Sight
from mlxsup.runners.guard import Guard
from mlxsup.runners.runner import (
    ADDRESS_TRIES,
    Notice,
    Runner,
    RunnerFailing,
    RunnerGone,
    RunnerReady,
)
from mlxsup.testing import Gate, fake_runner
from tests.waiting import LIMIT, until

from .children import LINUX, alive, descriptors, model
from .wire_server import read_all

STRANGER = """
import socket, sys, threading
it = socket.socket()
it.bind(("127.0.0.1", 0))
it.listen()
print(it.getsockname()[1], flush=True)
kept = []
while True:
    connection, _ = it.accept()
    if sys.argv[1] == "silence":
        kept.append(connection)
        continue
    connection.recv(65536)
    head = b"HTTP/1.1 %b X\\r\\nContent-Length: 15\\r\\nConnection: close\\r\\n\\r\\n" % sys.argv[1].encode()
    connection.sendall(b"220 mail.example\\r\\n" if sys.argv[1] == "SMTP" else head + b'{"status":"ok"}')
    connection.close()
"""


class Stage:
    """A runner under way, and what it has told."""

    def __init__(self, runner: Runner, told: list[Notice], more: asyncio.Event) -> None:
        self.runner = runner
        self.told = told
        self._more = more

    async def tells(self, kind: type[Notice]) -> Any:
        """Wait for the first notice of a kind."""
        with anyio.fail_after(LIMIT):
            while True:
                for notice in self.told:
                    if isinstance(notice, kind):
                        return notice
                self._more.clear()
                await self._more.wait()

    async def failure(self, prompt: str = "p") -> MlxsupError:
        """How an answer ends that does not end well."""
        with pytest.raises(MlxsupError) as caught:
            await read_all(await self.runner.completion(CompletionRequest(prompt=prompt)))
        return caught.value


@asynccontextmanager
async def stage(
    scenario: str = "", book: AddressBook | None = None, load_timeout: float = LIMIT, **keys: Any
) -> AsyncIterator[Stage]:
    """Run one runner of a fake program; it is stopped at the end, and nothing of it may be left."""
    address = keys.pop("address", "unix")
    announce = keys.pop("announce", False)
    settings = model(fake_runner(scenario, address=address, announce=announce), **{"stop_grace": "2s", **keys})
    told: list[Notice] = []
    more = asyncio.Event()

    def notify(notice: Notice) -> None:
        told.append(notice)
        more.set()

    async with AsyncExitStack() as ends:
        guard = Guard(lambda: None)
        ends.push_async_callback(guard.close)
        runner = Runner(
            settings,
            ENGINES["command"],
            1,
            load_timeout=load_timeout,
            guard=guard,
            addresses=book or AddressBook(guard.sockets),
            notify=notify,
        )
        running = asyncio.create_task(runner.run())
        try:
            yield Stage(runner, told, more)
        finally:
            with anyio.CancelScope(shield=True):
                runner.stop()
                await running
        assert [notice for notice in told if isinstance(notice, RunnerGone)] == told[-1:]
        assert runner.pid == -1
        assert list(guard.folder.iterdir()) == [], "a socket is left"


class TestLife:
    @pytest.mark.parametrize("address", ["unix", "tcp"])
    @pytest.mark.parametrize("announce", [False, True])
    async def test_from_nothing_to_gone(self, address: Transport, announce: bool) -> None:
        async with stage(address=address, announce=announce) as it:
            assert it.runner.pid == -1
            ready = await it.tells(RunnerReady)
            assert (ready.model, ready.generation) == ("m", 1)
            pid = it.runner.pid
            assert alive(pid)
            chunks = await read_all(await it.runner.completion(CompletionRequest(prompt="p")))
            assert "".join(chunk.content for chunk in chunks) == "t1 t2 t3 "
            it.runner.stop()
            gone = await it.tells(RunnerGone)
        assert gone.error is None
        assert not alive(pid)
        assert [type(notice) for notice in it.told] == [RunnerReady, RunnerGone]

    @pytest.mark.parametrize("phase", ["start", "bind", "loading"])
    async def test_it_can_be_stopped_while_it_starts(self, phase: str) -> None:
        async with Gate() as gate, stage(f"gate@{phase}={gate.path}") as it:
            await gate.arrival()
            await until(lambda: it.runner.pid > 0)  # it may be at the gate before we know that it was born
            pid = it.runner.pid
            it.runner.stop()
            gone = await it.tells(RunnerGone)
            assert gone.error is None
            assert not alive(pid)

    @pytest.mark.parametrize("turns", range(12))
    async def test_it_can_be_stopped_at_any_turn(self, turns: int) -> None:
        async with stage() as it:
            for _ in range(turns):
                await asyncio.sleep(0)
            it.runner.stop()
            gone = await it.tells(RunnerGone)
            assert gone.error is None

    async def test_its_descriptors_are_given_back(self) -> None:
        before = descriptors()
        async with stage("exit@loading=3", announce=True) as it:
            await it.tells(RunnerGone)
        await asyncio.sleep(0)
        assert descriptors() == before


class TestSight:
    async def test_a_stop_of_a_moment_is_nothing(self) -> None:
        """Two looks may come within milliseconds of each other; a program that is continued meanwhile is fine."""
        stopped = Sight(1 << 20, stopped=True)
        async with stage() as it:
            await it.tells(RunnerReady)
            for sight in (stopped, stopped, Sight(1 << 20, stopped=False), stopped):
                it.runner.note_sight(sight, {}, {})
            assert (await read_all(await it.runner.completion(CompletionRequest(prompt="p"))))[-1].done
            assert [type(notice) for notice in it.told] == [RunnerReady]

    async def test_one_that_lasts_is_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner_module, "STOPPED_FOR", 0.0)
        async with stage() as it:
            await it.tells(RunnerReady)
            for _ in range(2):
                it.runner.note_sight(Sight(1 << 20, stopped=True), {}, {})
            failing = await it.tells(RunnerFailing)
        assert isinstance(failing.error, RunnerDied)


class TestLoad:
    async def test_a_death_while_loading(self) -> None:
        async with stage("stderr@crash=CUDA out of memory; exit@loading=3") as it:
            gone = await it.tells(RunnerGone)
        error = gone.error
        assert isinstance(error, LoadFailed)
        assert "exit code 3: CUDA out of memory" in error.message
        assert error.details["cause"] == "out_of_memory"
        assert error.details["last_words"] == ["CUDA out of memory"]
        assert error.details["exit_code"] == 3

    async def test_no_progress(self) -> None:
        async with stage("stderr@loading=waiting for the GPU; load=forever; progress=0.5", load_timeout=0.5) as it:
            gone = await it.tells(RunnerGone)
        assert isinstance(gone.error, LoadTimeout)
        assert gone.error.details["last_words"] == ["waiting for the GPU"]
        assert gone.error.details["progress"] == 0.5

    async def test_a_slow_end_does_not_delay_the_news(self) -> None:
        async with stage("load=forever; ignore=SIGTERM", load_timeout=0.2, stop_grace="3s") as it:
            await it.tells(RunnerFailing)
            assert not [notice for notice in it.told if isinstance(notice, RunnerGone)]

    async def test_an_unset_variable(self) -> None:
        async with stage(env={"KEY": "${NOT_SET_ANYWHERE}"}) as it:
            gone = await it.tells(RunnerGone)
        assert isinstance(gone.error, LoadFailed)
        assert gone.error.permanent


class Ports(AddressBook):
    """Gives these ports first."""

    def __init__(self, folder: Path, *ports: int) -> None:
        super().__init__(lambda: folder)
        self._ports = list(ports)
        self.given = 0
        self.on_second: Callable[[], None] = lambda: None

    def place(self, model: str, transport: Transport) -> Place:
        self.given += 1
        if self.given == 2:
            self.on_second()
        return Place(Address(port=self._ports.pop(0))) if self._ports else super().place(model, transport)


@pytest.fixture(params=["200"])
def stranger(request: pytest.FixtureRequest) -> Any:
    """The port of somebody else's server, which answers everything with the same status, or something odd."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", STRANGER, request.param], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.skipif(not LINUX, reason="a Mac shows the connections of others to root only")
class TestPorts:
    async def test_a_port_that_was_taken_is_given_up_for_another(self, tmp_path: Path, stranger: int) -> None:
        book = Ports(tmp_path, stranger)
        async with stage(address="tcp", book=book) as it:
            await it.tells(RunnerReady)
            assert it.runner.address is not None
            assert it.runner.address.port != stranger
            assert book.given == 2
            chunks = await read_all(await it.runner.completion(CompletionRequest(prompt="p")))
            assert chunks[0].content == "t1 "

    @pytest.mark.parametrize("stranger", ["200", "404", "500", "503", "SMTP", "silence"], indirect=True)
    async def test_a_stranger_is_not_taken_for_the_runner_nor_waited_for(self, tmp_path: Path, stranger: int) -> None:
        """Our program has not come so far as to notice that its port is taken."""
        async with Gate() as gate:
            book = Ports(tmp_path, stranger)
            async with stage(f"gate@bind={gate.path}", address="tcp", book=book) as it:
                await until(lambda: book.given == 2)
                assert it.told == []
                gate.open()
                await it.tells(RunnerReady)
                assert it.runner.address is not None
                assert it.runner.address.port != stranger

    async def test_three_tries_are_enough(self, tmp_path: Path, stranger: int) -> None:
        book = Ports(tmp_path, *[stranger] * 10)
        async with stage(address="tcp", book=book) as it:
            gone = await it.tells(RunnerGone)
        assert book.given == ADDRESS_TRIES
        assert isinstance(gone.error, LoadFailed)
        assert "3 times in a row" in gone.error.message
        assert gone.error.details["stage"] == "address"
        assert not gone.error.permanent

    async def test_a_program_that_shares_no_port_is_not_given_a_held_one_again(self, tmp_path: Path) -> None:
        async with stage("reuse=none", address="tcp", book=AddressBook(lambda: tmp_path)) as it:
            await it.tells(RunnerReady)

    async def test_a_stop_between_two_tries(self, tmp_path: Path, stranger: int) -> None:
        book = Ports(tmp_path, *[stranger] * 10)
        async with stage(address="tcp", book=book) as it:
            book.on_second = it.runner.stop
            gone = await it.tells(RunnerGone)
        assert gone.error is None
        assert book.given == 2

    async def test_the_port_is_free_when_it_is_gone(self, tmp_path: Path) -> None:
        async with stage(address="tcp", book=AddressBook(lambda: tmp_path)) as it:
            await it.tells(RunnerReady)
            assert it.runner.address is not None
            port = it.runner.address.port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


class TestAnswers:
    """Whatever goes wrong with an answer, its error carries what the runner said last."""

    @pytest.mark.parametrize(
        ("scenario", "kind"),
        [
            ("crash@1", RunnerDied),
            ("exit@first", RunnerDied),
            ("half@1", BadAnswer),
            ("cut@1", BadAnswer),
            ("done=no", BadAnswer),
            ("line@1=no JSON", BadAnswer),
            ("steps=2", BadAnswer),
            ("steps=2; error@1=no", RunnerError),
            ("status=500:no", RunnerError),
            ("hang@1", Stalled),
        ],
    )
    async def test_the_last_words_are_in_it(self, scenario: str, kind: type[MlxsupError]) -> None:
        async with stage(f"stderr@request=error: I feel ill; {scenario}", silence_timeout="200ms") as it:
            await it.tells(RunnerReady)
            with anyio.fail_after(LIMIT):
                error = await it.failure()
        assert isinstance(error, kind)
        assert error.details["last_words"] == ["error: I feel ill"]
        assert error.details["last_error"] == "error: I feel ill"
        assert error.details["model"] == "m"

    async def test_a_stop_is_not_blamed_on_the_runner(self) -> None:
        async with Gate() as gate, stage(f"gate@1={gate.path}") as it:
            await it.tells(RunnerReady)
            failing = asyncio.create_task(it.failure())
            await gate.arrival()
            it.runner.stop()
            assert isinstance(await failing, Unloaded)

    async def test_the_news_of_a_death_comes_before_its_caller_can_ask_again(self) -> None:
        async with stage("crash@1") as it:
            await it.tells(RunnerReady)
            assert isinstance(await it.failure(), RunnerDied)
            assert any(isinstance(notice, RunnerFailing | RunnerGone) for notice in it.told)

    async def test_one_that_is_gone_takes_no_request(self) -> None:
        async with stage() as it:
            await it.tells(RunnerReady)
            os.kill(it.runner.pid, 9)
            await it.tells(RunnerGone)
            assert isinstance(await it.failure(), RunnerDied)
