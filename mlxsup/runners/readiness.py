"""Waiting for a runner to be ready: probes, raced against its exit, a stop, and a deadline that progress moves on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from mlxsup.config import ModelSettings
from mlxsup.engines import Address, Finding, Verdict
from mlxsup.errors import LoadFailed, LoadTimeout
from mlxsup.runners import footprint
from mlxsup.runners.listener import Owner, owner
from mlxsup.runners.output import shown
from mlxsup.runners.pipes import connect_reader
from mlxsup.runners.probe import Probe
from mlxsup.runners.process import Process
from mlxsup.shortages import describe_shortage
from mlxsup.threads import in_thread_or_here

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 1.0
MIN_PAUSE = 0.002
MAX_PAUSE = 0.25
PAUSE_SHARE = 0.02
GROWTH = 1 << 20
"""Resident memory that grows by less than this many bytes between two looks is no progress."""

T = TypeVar("T")


class Interrupted(Exception):
    """The race was lost: the child exited, or a stop was asked for."""


class StrangerListens(Exception):
    """Somebody else's process answers on the port that the runner was given."""


def pause(elapsed: float) -> float:
    """Return the seconds between two probes, `elapsed` seconds after the spawn or the last sign of life."""
    return max(MIN_PAUSE, min(MAX_PAUSE, PAUSE_SHARE * elapsed))


async def race(work: Awaitable[T], interrupted: asyncio.Future[None]) -> T:
    """Return what `work` returns.

    Raises:
        Interrupted: `interrupted` was resolved first; `work` is cancelled and over.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if interrupted.done():
            raise Interrupted
        return task.result()
    finally:
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):  # it lost: whatever it ends with is nobody's concern
            await task


class Readiness:
    """Watches one load. `progress` and `detail` say how far it is, for status and for the error of a timeout."""

    def __init__(
        self,
        model: ModelSettings,
        process: Process,
        address: Address,
        probe: Probe,
        load_timeout: float,
    ) -> None:
        self._model = model
        self._process = process
        self._address = address
        self._probe = probe
        self._load_timeout = load_timeout
        self._check_owner = address.transport == "tcp" and model.check_listener
        self._owner: asyncio.Task[Owner | None] | None = None
        self._moved = process.started
        self._resident = 0
        self._looked = 0.0
        self.progress: float | None = None
        self.detail = "nothing answers yet"
        self._told_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell_ready(self) -> None:
        """Take the runner's own word that it is ready."""
        if not self._told_ready.done():
            self._told_ready.set_result(None)
        self._process.activity.note()

    async def wait(self, interrupted: asyncio.Future[None]) -> None:
        """Return when the runner is ready.

        Raises:
            Interrupted: it exited, or a stop was asked for.
            StrangerListens: the port is somebody else's; try another.
            LoadFailed: the engine says that it will never be ready.
            LoadTimeout: no progress for the load timeout, or no end within the cap.
        """
        try:
            await self._wait(interrupted)
        finally:
            if self._owner is not None:
                self._owner.cancel()

    async def _wait(self, interrupted: asyncio.Future[None]) -> None:
        paced_from = self._process.started
        activity = self._process.activity
        while True:
            seen = activity.count
            finding = await race(self._ask(), interrupted)
            ours = finding.verdict is Verdict.LOADING or await race(self._is_ours(), interrupted)
            if finding.verdict is Verdict.READY and ours:
                return
            if finding.verdict is Verdict.FAILED and ours:
                raise LoadFailed(finding.detail, details={"stage": "loading", "model": self._model.name})
            self.detail = finding.detail or self.detail
            if await race(self._note_progress(finding), interrupted):
                paced_from = time.monotonic()
            self._check_deadline()
            await race(self._until_next(seen, pause(time.monotonic() - paced_from)), interrupted)
            if activity.count != seen:
                paced_from = time.monotonic()

    async def _until_next(self, seen: int, seconds: float) -> None:
        """Pause, less long if the child shows a sign of life; one that shows them all the time is no reason to hurry."""
        began = time.monotonic()
        await self._process.activity.wait(seen, seconds)
        await asyncio.sleep(max(0.0, began + MIN_PAUSE - time.monotonic()))

    async def _ask(self) -> Finding:
        try:
            finding = await race(self._probe.ask(PROBE_TIMEOUT), self._told_ready)
        except Interrupted:
            return Finding(Verdict.READY)
        if self._probe.reached:
            self._note_answer()
        return finding or Finding(Verdict.LOADING, detail=self._probe.silence)

    def _note_answer(self) -> None:
        """Look up who it is that answers, once and off the loop, while the load goes on; a stranger ends it at once."""
        if self._owner is not None and self._owner.done() and self._owner.result() is None:
            self._owner = None
        if self._check_owner and self._owner is None:
            look = self._look_for_owner()
            self._owner = asyncio.create_task(look, name=f"mlxsup owner of {self._address}")
        elif self._owner is not None and self._owner.done() and self._owner.result() is Owner.STRANGER:
            raise StrangerListens

    async def _look_for_owner(self) -> Owner | None:
        """Return who listens, None when that cannot be seen now; the next look may succeed."""
        try:
            return await in_thread_or_here(owner, self._address, self._process.pid, self._process.mark)
        except OSError as error:
            self.detail = f"cannot look who listens on {self._address}: {describe_shortage(error)}"
            return None

    async def _is_ours(self) -> bool:
        """Tell whether it is our runner that says it is ready, or will never be; False when that is to be asked again."""
        self._note_answer()
        if self._owner is None:
            return True
        found = await asyncio.shield(self._owner)
        if found is Owner.STRANGER:
            raise StrangerListens
        if found is Owner.UNKNOWN:
            log.info("cannot tell who listens on %s; taken for the runner of %s", self._address, self._model.name)
        return found is not None

    async def _note_progress(self, finding: Finding) -> bool:
        """Move the deadline on when health progress or resident memory grew; True for the former."""
        now = time.monotonic()
        if finding.progress is not None and finding.progress > (self.progress or 0.0):
            self.progress = finding.progress
            self._moved = now
            return True
        if now - self._looked >= min(1.0, self._load_timeout / 4):
            self._looked = now
            resident = await in_thread_or_here(footprint.measure, self._process.pid)
            if resident > self._resident + GROWTH:
                self._resident = resident
                self._moved = now
        return False

    def _check_deadline(self) -> None:
        now = time.monotonic()
        loading = now - self._process.started
        if loading > self._model.load_cap:
            raise self._timeout(f"was not ready within {self._model.load_cap:g} s, the cap")
        if now - self._moved > self._load_timeout:
            raise self._timeout(f"made no progress for {self._load_timeout:g} s")

    def _timeout(self, what: str) -> LoadTimeout:
        last = self._process.output.last_error
        told = f"; its last words: {shown(last)}" if last else ""
        return LoadTimeout(
            f"{self._model.name} {what} ({self.detail}){told}",
            details={
                "stage": "loading",
                "detail": self.detail,
                "progress": self.progress,
                "model": self._model.name,
                "last_error": last,
                "last_words": self._process.output.last_words(),
            },
        )


async def listen_for_ready_byte(reader: int, on_ready: Callable[[], None]) -> asyncio.BaseTransport:
    """Call `on_ready` when a byte comes out of the descriptor `reader`, which now belongs to the transport returned."""
    transport, _ = await connect_reader(lambda: _ReadyByte(on_ready), reader)
    return transport


class _ReadyByte(asyncio.Protocol):
    def __init__(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready

    def data_received(self, data: bytes) -> None:
        if data:
            self._on_ready()
