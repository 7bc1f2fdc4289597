"""The supervisor's end of the sentinel: keeps one running, tells it which groups to end if the supervisor is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlxsup
from mlxsup.errors import MlxsupError, ResourceExhausted
from mlxsup.forks import Owner
from mlxsup.runners import procfs, spawning
from mlxsup.runners.liveness import until_next
from mlxsup.runners.output import OutputRecord, Stream
from mlxsup.runners.process import ExitRecord, Process
from mlxsup.runners.socketfolder import SocketFolder
from mlxsup.threads import in_thread_or_here

log = logging.getLogger(__name__)

MIN_LIFE = 1.0
"""A sentinel that lived less than this many seconds is not replaced at once: something is wrong with all of them."""
TRY_AGAIN = 1.0
"""Seconds between two tries to start one."""
PING_EVERY = 5.0
LAST_LIMIT = 10.0
"""Seconds for each piece of work at the end: a disk that hangs must not keep a program in its `async with`."""
SILENT_PINGS = 2
"""A sentinel that is silent after this many pings in a row is stopped or hangs, and is replaced."""

_PONG = re.compile("^here$")
_MAIN = "from mlxsup.runners.sentinel import main; main()"


class Guard:
    """What makes sure that no runner outlives this supervisor: a random mark, a private folder, a sentinel process.

    The sentinel is started before the first runner, and replaced when it dies or does nothing, however often that must be tried.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        """Make the mark and the folder; `on_change` is called when the set of watched groups or the folder has changed.

        Raises:
            LoadFailed: there is no short writable folder for sockets.
        """
        spawning.warn_of_lost_ends()
        self.mark = secrets.token_hex(8)
        self._owner = Owner()
        self._folder = SocketFolder()
        self._on_change = on_change
        self._groups: dict[int, str] = {}
        self._sentinel: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._pipe: int | None = None
        self._unsent = bytearray()
        self._starting = asyncio.Lock()

    def new_mark(self) -> str:
        """Return a mark for one runner; it starts with the supervisor's."""
        return f"{self.mark}.{secrets.token_hex(4)}"

    async def ready(self) -> None:
        """Have a living sentinel; called before each spawn.

        Raises:
            LoadFailed, ResourceExhausted: the sentinel cannot be started; nothing may be spawned then.
        """
        async with self._starting:
            if self._sentinel is None or self._sentinel.exited is not None:
                self._sentinel = await self._start()
            if self._keeper is None or self._keeper.done():
                self._keeper = asyncio.create_task(self._keep(self._sentinel), name="mlxsup sentinel")

    @property
    def folder(self) -> Path:
        """The folder of sockets."""
        return self._folder.path

    def sockets(self) -> Path:
        """Return the folder of sockets, made anew if somebody has tidied it away.

        Raises:
            LoadFailed: there is no short writable folder for it.
        """
        if self._folder.restore():
            log.warning("the folder of sockets is gone; another one is %s", self.folder)
            self._tell_folder()
            self._on_change()
        return self.folder

    @property
    def groups(self) -> dict[int, str]:
        """The watched groups, each with the start time of its leader ("-" where unknown)."""
        return dict(self._groups)

    def watch(self, pgid: int) -> None:
        """Have this group ended if the supervisor dies."""
        self._groups[pgid] = procfs.start_time(pgid) or "-"
        self._tell(f"watch {pgid} {self._groups[pgid]}")
        self._on_change()

    def forget(self, pgid: int) -> None:
        """The group is gone and its number free for others."""
        if self._groups.pop(pgid, None) is not None:
            self._tell(f"forget {pgid}")
            self._on_change()

    async def close(self, *last: Callable[[], object]) -> None:
        """Dismiss the sentinel, wait for its end, remove the folder; then do what else is `last`, off the loop.

        In a child that the program has forked nothing is done: all of this is the parent's.
        """
        if not self._owner.is_here:
            return
        self._tell("bye")
        self._drop_pipe()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._sentinel is not None and self._sentinel.exited is None:
            watcher = asyncio.create_task(self._sentinel.watch(), name="mlxsup sentinel")
            await self._sentinel.stop(signal.SIGCONT, grace=1.0)  # it ends by itself; a stopped one is helped along
            await watcher
        works: tuple[Callable[[], object], ...] = (partial(shutil.rmtree, self.folder, ignore_errors=True), *last)
        for work in works:
            try:
                async with asyncio.timeout(LAST_LIMIT):
                    await in_thread_or_here(work)
            except TimeoutError:
                log.warning("a disk hangs, so something is left behind in %s or among the state files", self.folder)

    async def _start(self) -> Process:
        self._drop_pipe()
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise ResourceExhausted.of("cannot start the sentinel", error) from error
        try:
            process = await Process.spawn(
                (sys.executable, "-I", "-S", "-c", _program(), self.mark, str(self.folder), str(os.getpid())),
                env={},
                cwd="/",
                mark="sentinel",
                output=OutputRecord(_log_complaint, noise=_PONG),
                stdin=reader,
            )
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        os.set_blocking(writer, False)
        self._pipe = writer
        self._tell_folder()  # it may have changed meanwhile
        for pgid, started in self._groups.items():
            self._tell(f"watch {pgid} {started}")
        return process

    async def _keep(self, sentinel: Process) -> None:
        """Replace the sentinel when it ends, until the end."""
        while True:
            record = await self._see_off(sentinel)
            log.warning("the sentinel ended (%s); starting another", record.describe())
            if record.uptime < MIN_LIFE:
                await asyncio.sleep(MIN_LIFE)
            sentinel = await self._successor(sentinel)

    async def _see_off(self, sentinel: Process) -> ExitRecord:
        """Wait for its end, which comes soon if it does nothing."""
        pinging = asyncio.create_task(self._end_if_silent(sentinel), name="mlxsup pings")
        try:
            return await sentinel.watch()
        finally:
            pinging.cancel()
            await asyncio.wait({pinging})

    async def _end_if_silent(self, sentinel: Process) -> None:
        silent = 0
        while silent < SILENT_PINGS:
            seen = sentinel.activity.count
            self._tell("ping")
            await asyncio.sleep(until_next(PING_EVERY))
            silent = silent + 1 if sentinel.activity.count == seen else 0
        log.warning("the sentinel does not answer: it was stopped, or hangs; ending it")
        sentinel.signal_group(signal.SIGKILL)

    async def _successor(self, gone: Process) -> Process:
        """Return the one that lives in its place, started by us or for a runner meanwhile."""
        told = False
        while True:
            async with self._starting:
                if self._sentinel is not None and self._sentinel is not gone:
                    return self._sentinel
                try:
                    self._sentinel = await self._start()
                except (MlxsupError, OSError) as error:
                    if not told:
                        log.warning("no sentinel: %s; trying again until there is one", error)
                    told = True
                else:
                    return self._sentinel
            await asyncio.sleep(TRY_AGAIN)

    def _tell_folder(self) -> None:
        self._tell(f"folder {os.fsencode(self.folder).hex()}")

    def _tell(self, order: str) -> None:
        """Send an order; what a sentinel that does not read leaves no room for is sent later, in its turn."""
        if self._pipe is not None and self._owner.is_here:
            self._unsent += f"{order}\n".encode()
            self._send()

    def _send(self) -> None:
        if self._pipe is None:
            return
        try:
            del self._unsent[: os.write(self._pipe, self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:  # it died; its successor is told everything
            log.warning("the sentinel does not listen: %s", error)
            self._unsent.clear()
        loop = asyncio.get_running_loop()
        if self._unsent:
            loop.add_writer(self._pipe, self._send)
        else:
            loop.remove_writer(self._pipe)

    def _drop_pipe(self) -> None:
        self._unsent.clear()
        if self._pipe is not None:
            asyncio.get_running_loop().remove_writer(self._pipe)
            os.close(self._pipe)
            self._pipe = None


def _program() -> str:
    """What the sentinel runs. Installed packages cost it memory: of those it sees psutil, and only where it asks that."""
    homes = [Path(mlxsup.__file__).parent.parent]
    if not procfs.AVAILABLE:
        import psutil

        homes.append(Path(psutil.__file__).parent.parent)
    return f"import sys; sys.path += {[*map(str, homes)]!r}; {_MAIN}"


def _log_complaint(stream: Stream, line: str, *, is_error: bool) -> None:
    log.error("sentinel: %s", line, extra={"stream": stream, "is_error": is_error})
