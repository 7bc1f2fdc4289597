"""One child process: spawned with pipes of our own, its end noticed once, its group signalled, its leavings found.

The only user of `asyncio.create_subprocess_exec`. Nothing here knows of models or HTTP.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import anyio
import msgspec

from mlxsup.errors import MlxsupError
from mlxsup.forks import Owner
from mlxsup.runners import marks, procfs, spawning
from mlxsup.runners.output import STREAMS, Cause, OutputRecord, Stream, shown
from mlxsup.runners.pipes import connect_reader
from mlxsup.shortages import describe_shortage
from mlxsup.threads import in_thread, in_thread_or_here

log = logging.getLogger(__name__)

DRAIN_LIMIT = 1.0
KILL_WAIT = 5.0
GROUP_LOOK = 0.02
"""Seconds between two looks at a group whose leader has ended, while what is left of it ends in its own way."""
BLIND_LOOK = 0.25
"""Seconds between two looks for what is left, while there are no descriptors to look with."""
_DRAIN_PAUSE = 0.001


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended. `at` is monotonic, `uptime` seconds since the spawn; exactly one of code and signal is set."""

    code: int | None
    signal: int | None
    at: float
    uptime: float
    cause: Cause
    last_error: str
    last_words: list[str]

    def describe(self) -> str:
        """Return `exit code 3` or `SIGKILL`, with the last error behind it where there is one."""
        how = f"exit code {self.code}" if self.signal is None else _signal_name(self.signal)
        return f"{how}: {shown(self.last_error)}" if self.last_error else how

    def details(self) -> dict[str, Any]:
        """Return the facts for an error's details."""
        return {
            "exit_code": self.code,
            "signal": None if self.signal is None else _signal_name(self.signal),
            "uptime": round(self.uptime, 3),
            "cause": self.cause,
            "last_error": self.last_error,
            "last_words": self.last_words,
        }


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


class _Pump(asyncio.Protocol):
    """Reads one pipe for as long as it has data; never stops reading, so the child never blocks on its output."""

    def __init__(self, output: OutputRecord, stream: Stream, on_data: Callable[[], None]) -> None:
        self._output = output
        self._stream: Stream = stream
        self._on_data = on_data
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self._output.feed(self._stream, data)
        self._on_data()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.ended:
            self.ended = True
            self._output.end(self._stream)


class Activity:
    """Signs of life of a child (output, its ready byte, its end), for the one task that waits for the next of them."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.count = 0

    def note(self) -> None:
        """Something happened."""
        self.count += 1
        self._event.set()

    async def wait(self, seen: int, timeout: float) -> None:
        """Wait until there were more signs than the `seen` ones, at most `timeout` seconds."""
        if self.count != seen:
            return
        self._event.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()


class Process:
    """A child in a session of its own. Made by `Process.spawn`; `watch` must run until it returns the exit record."""

    def __init__(self, child: asyncio.subprocess.Process, mark: str, output: OutputRecord) -> None:
        self._child = child
        self._owner = Owner()
        self.pid = child.pid
        self.mark = mark
        self.output = output
        output.pid = self.pid
        self.started = time.monotonic()
        self.activity = Activity()
        self._pumps: list[tuple[asyncio.ReadTransport, _Pump, int]] = []
        self._exit: asyncio.Future[ExitRecord] = asyncio.get_running_loop().create_future()
        self._grace_ends: float | None = None
        self._blind = False

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None,
        mark: str,
        output: OutputRecord,
        pass_fds: Sequence[int] = (),
        stdin: int = asyncio.subprocess.DEVNULL,
    ) -> Process:
        """Start `argv` with its output on our pipes, nothing on stdin unless given, no descriptors but `pass_fds`.

        Raises:
            EngineUnavailable: the program is not there, not executable, or not for this machine.
            ResourceExhausted: the system has no room for another process or descriptor; another try may succeed.
            LoadFailed: it cannot be started for another reason.
        """
        whole = asyncio.create_task(cls._spawn(argv, {**env, marks.MARK: mark}, cwd, mark, output, pass_fds, stdin))
        try:
            return await asyncio.shield(whole)
        except asyncio.CancelledError:  # half a child is worse than a late one: have it whole, then end it
            with anyio.CancelScope(shield=True), suppress(MlxsupError):
                process = await whole
                process.signal_group(signal.SIGKILL)
                await process.watch()
            raise

    @classmethod
    async def _spawn(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | None,
        mark: str,
        output: OutputRecord,
        pass_fds: Sequence[int],
        stdin: int,
    ) -> Process:
        with ExitStack() as always, ExitStack() as on_failure:
            ends: dict[Stream, int] = {}
            readers: dict[Stream, int] = {}
            try:
                for stream in STREAMS:
                    readers[stream], ends[stream] = os.pipe()
                    always.callback(os.close, ends[stream])
                    on_failure.callback(os.close, readers[stream])
                inheritable = await in_thread(spawning.prepare, argv, env)
                spawning.require_descriptors()
                with spawning.kept_private(inheritable):
                    child = await asyncio.create_subprocess_exec(
                        *argv,
                        **spawning.signals_reset(),
                        stdin=stdin,
                        stdout=ends["stdout"],
                        stderr=ends["stderr"],
                        env=env,
                        cwd=cwd,
                        pass_fds=tuple(pass_fds),
                        start_new_session=True,
                    )
            except (OSError, ValueError) as error:
                raise spawning.spawn_error(argv[0], error, cwd) from error
            on_failure.pop_all()
        process = cls(child, mark, output)
        for stream in STREAMS:
            make = partial(_Pump, output, stream, process.activity.note)
            transport, pump = await connect_reader(make, readers[stream])
            process._pumps.append((transport, pump, readers[stream]))
        return process

    @property
    def is_ours(self) -> bool:
        """Whether this is the program that started it, and not a child that the program has forked."""
        return self._owner.is_here

    @property
    def exited(self) -> ExitRecord | None:
        """The exit record, once there is one."""
        return self._exit.result() if self._exit.done() and not self._exit.cancelled() else None

    async def wait(self) -> ExitRecord:
        """Wait for the exit record; any number of callers may, any number of times."""
        return await asyncio.shield(self._exit)

    async def watch(self) -> ExitRecord:
        """Wait for the end, end the rest of the group, read the output to its end, and publish the exit record.

        A child that was asked to stop may be a wrapper that ends at once: what it started has the rest of the grace.
        """
        status = await self._child.wait()
        at = time.monotonic()
        await self._rest_of_grace()
        self.signal_group(signal.SIGKILL)
        await self._drain_output()
        record = ExitRecord(
            code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
            at=at,
            uptime=at - self.started,
            cause=self.output.cause,
            last_error=self.output.last_error,
            last_words=self.output.last_words(),
        )
        if not self._exit.done():
            self._exit.set_result(record)
        self.activity.note()
        return record

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the whole group, if it is ours; a group that is gone is fine."""
        if self.is_ours:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    async def stop(self, number: signal.Signals, grace: float) -> bool:
        """Ask the group to end, wait `grace` seconds for all of it, then kill it; True when the child was reaped.

        A stopped (SIGSTOP) child is continued, or the signal would never reach it.
        """
        if self.exited is None:
            ends = time.monotonic() + grace
            self._grace_ends = ends if self._grace_ends is None else min(ends, self._grace_ends)
            self.signal_group(number)
            self.signal_group(signal.SIGCONT)
            if not await self._reaped_within(grace):
                self._grace_ends = 0.0
                self.signal_group(signal.SIGKILL)
        return await self._reaped_within(KILL_WAIT)

    async def sweep(self) -> list[int] | None:
        """Kill what is left of the group and what carries the mark; return the pids that would not go.

        None when nothing could be seen all the time, because we are out of descriptors: sweep again.
        """
        limit = blind_until = time.monotonic() + KILL_WAIT
        known: dict[int, str] = {}
        while True:
            try:
                left = await in_thread_or_here(self._leavings, known)
            except OSError as error:
                self._note_blind(error)
                if time.monotonic() > blind_until:
                    return None
                await asyncio.sleep(BLIND_LOOK)
                limit = time.monotonic() + KILL_WAIT
                continue
            if left:
                self.signal_group(signal.SIGKILL)
            marks.kill(left)
            if not left or time.monotonic() > limit:
                self._reap_orphans(known)
                return left
            await asyncio.sleep(0.01)

    def _note_blind(self, error: OSError) -> None:
        if not self._blind:
            log.warning("cannot see yet what %d left behind: %s", self.pid, describe_shortage(error))
        self._blind = True

    def _leavings(self, known: dict[int, str]) -> list[int]:
        """Return what is left, and add it to what is known of: while it dies it has no environment, and thus no mark."""
        found = {*marks.marked(self.mark), *marks.group_members(self.pid)}
        known.update((pid, procfs.start_time(pid)) for pid in found - known.keys())
        dying = {pid for pid, start in known.items() if procfs.is_running(pid) and procfs.start_time(pid) == start}
        return sorted(found | dying)

    def _reap_orphans(self, known: Mapping[int, str]) -> None:
        """Reap what fell to us when its parent ended: we may be pid 1 of a container, or a subreaper.

        Each by its own pid, after it was seen not to be another one by now: the program waits for children of its own.
        """
        if self.exited is None or sys.platform == "darwin":
            return  # macOS gives them to launchd
        with suppress(ChildProcessError):
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while (dead := os.waitid(os.P_PGID, self.pid, look)) and dead.si_pid != self.pid:
                os.waitpid(dead.si_pid, os.WNOHANG)
        for pid, start in known.items():
            with suppress(ChildProcessError):
                if pid != self.pid and procfs.start_time(pid) == start != "":
                    os.waitpid(pid, os.WNOHANG)

    async def _rest_of_grace(self) -> None:
        while time.monotonic() < (self._grace_ends or 0.0) and await self._has_group():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(GROUP_LOOK)

    async def _has_group(self) -> bool:
        """Whether anything of the group is left; what we have no descriptors to look at may be."""
        try:
            return bool(await in_thread_or_here(marks.group_members, self.pid))
        except OSError:
            return True

    async def _reaped_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait({self._exit}, timeout=seconds)
        return bool(done)

    async def _drain_output(self) -> None:
        """Read what the child wrote before its end. A grandchild may hold the pipe open: an empty pipe is enough."""
        limit = time.monotonic() + DRAIN_LIMIT
        while time.monotonic() < limit:
            if all(pump.ended or not _bytes_waiting(fd) for _, pump, fd in self._pumps):
                break
            await asyncio.sleep(_DRAIN_PAUSE)
        for transport, pump, _ in self._pumps:
            transport.close()
            pump.connection_lost(None)


def _bytes_waiting(fd: int) -> int:
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except (OSError, ValueError):  # closed: its end was read
        return 0
    return count[0]
