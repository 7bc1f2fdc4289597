"""Runner: one process of one model, from nothing to gone. Its `run` task is the only writer of its state."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import aiohttp
import anyio
import msgspec

from mlxsup.config import ModelSettings
from mlxsup.engines import Address, Engine, Launch
from mlxsup.errors import BadAnswer, LoadFailed, MlxsupError, ResourceExhausted, RunnerDied, Unloaded
from mlxsup.protocol import CompletionRequest
from mlxsup.runners import environment
from mlxsup.runners.addresses import AddressBook
from mlxsup.runners.footprint import Sight, Watched
from mlxsup.runners.guard import Guard
from mlxsup.runners.liveness import Patience, Pulse, wedged
from mlxsup.runners.marks import SUPERVISOR_PID
from mlxsup.runners.output import OutputRecord, Stream
from mlxsup.runners.passage import Passage
from mlxsup.runners.probe import Probe, open_session
from mlxsup.runners.process import ExitRecord, Process
from mlxsup.runners.readiness import (
    Interrupted,
    Readiness,
    StrangerListens,
    listen_for_ready_byte,
    race,
)
from mlxsup.runners.relay import Answer, Limits, post_completion
from mlxsup.shortages import is_shortage
from mlxsup.threads import in_thread

log = logging.getLogger(__name__)

ADDRESS_TRIES = 3
TELL_AFTER = 0.5
"""How long the clean-up after a failed load may delay the news of it."""
STOPPED_FOR = 0.8
"""Seconds between two looks that find the process stopped, after which it is taken to stay so."""
BLAME_WAIT = 1.0
"""How long a broken answer waits for the exit that probably explains it."""


class RunnerReady(msgspec.Struct, frozen=True):
    """The runner can be used; `seconds` is how long its load took."""

    model: str
    generation: int
    seconds: float


class RunnerFailing(msgspec.Struct, frozen=True):
    """The runner could not be loaded, or died; what is left of it is being cleaned up."""

    model: str
    generation: int
    error: MlxsupError


class RunnerGone(msgspec.Struct, frozen=True):
    """The process and all it left are gone; `error` says why if nobody asked for it."""

    model: str
    generation: int
    error: MlxsupError | None


class RunnerStuck(msgspec.Struct, frozen=True):
    """SIGKILL was sent and the process, or one it left behind, is still there."""

    model: str
    generation: int
    pids: list[int]


Notice = RunnerReady | RunnerFailing | RunnerGone | RunnerStuck


class Runner:
    """One generation of a model's process. Making one starts nothing; `run` does, and returns when all is gone."""

    def __init__(
        self,
        model: ModelSettings,
        engine: Engine,
        generation: int,
        *,
        load_timeout: float,
        guard: Guard,
        addresses: AddressBook,
        notify: Callable[[Notice], None],
        shares: Mapping[str, int] | None = None,
        device_env: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.generation = generation
        self.address: Address | None = None
        self.started = time.monotonic()
        self.exit: ExitRecord | None = None
        self.pulse = Pulse()
        self.shares: Mapping[str, int] = shares or {}
        """Bytes that were reserved for it, by device."""
        self.used: Mapping[str, int] = {}
        self.peak: dict[str, int] = {}
        self.worked = False
        """Whether it was ever leased: before that its memory tells little."""
        self._device_env = device_env or {}
        self._engine = engine
        self._load_timeout = load_timeout
        self._guard = guard
        self._addresses = addresses
        self._notify = notify
        self._process: Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._probe: Probe | None = None
        self._readiness: Readiness | None = None
        self._ready_pipe: asyncio.BaseTransport | None = None
        self._output = OutputRecord(self._log_line, engine.noise)
        self._stopping = asyncio.Event()
        self._interrupted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loaded = False
        self._abandoned = False
        self._stopped_since: float | None = None
        self._wedged = ""

    # What others may ask while `run` is at work

    @property
    def pid(self) -> int:
        """The process's pid, -1 without one."""
        return self._process.pid if self._process is not None and self.exit is None else -1

    @property
    def progress(self) -> float | None:
        """How far the load is, 0 to 1, if the runner says."""
        return self._readiness.progress if self._readiness is not None else None

    @property
    def last_error(self) -> str:
        """The line of output that best says what is wrong, "" while there is none that looks like an error."""
        unwanted = self.exit is not None and not self._stopping.is_set()
        return self._output.last_error if unwanted or self._output.cause != "unknown" else ""

    def last_words(self) -> list[str]:
        """The first and last lines of its error output."""
        return self._output.last_words()

    def watched(self) -> Watched:
        """Return what there is to know of it for a look at it."""
        told = self._probe.memory if self._probe is not None else None
        return Watched(self.pid, self.shares, not self._loaded or self.pulse.users > 0, told, self._loaded)

    def note_sight(self, sight: Sight, used: Mapping[str, int], needed: Mapping[str, int]) -> None:
        """Take what the process looks like just now; one still stopped a moment later is ended.

        `used` is bytes by device as they count now, `needed` as they would with nobody to share pages with.
        """
        if self.pid < 0 or sight.resident == 0:
            return
        self.used = used
        for device, size in needed.items():
            self.peak[device] = max(size, self.peak.get(device, 0))
        if not sight.stopped:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = time.monotonic()
        elif time.monotonic() - self._stopped_since >= STOPPED_FOR:
            self._give_up("its process was stopped and does no work")

    def stop(self) -> None:
        """Ask `run` to end the process now, in any phase; twice is once."""
        self._stopping.set()
        self._interrupt()

    def abandon(self) -> None:
        """Wait no longer for a process that does not die of SIGKILL."""
        self._abandoned = True

    def kill_now(self) -> None:
        """SIGKILL the group without waiting, for a loop that is being torn down."""
        if self._process is not None and self.exit is None:
            self._process.signal_group(signal.SIGKILL)

    async def completion(self, request: CompletionRequest) -> Answer:
        """Send one request; returns once the runner has accepted it. Runs in the caller's own task.

        Raises:
            NotSupported, UnsupportedParameter: the engine cannot do this, or not with these fields.
            RunnerDied, RunnerError, BadAnswer, Stalled: as the runner behaves.
        """
        self._engine.require("completion")
        self._engine.check_request(self.model, request)
        if self._session is None or self.address is None or self.exit is not None:
            raise await self.blame("it is not there any more")
        limits = Limits(first_chunk=self.model.first_chunk_timeout, silence=self.model.silence_timeout)
        url = f"{self.address.base_url}/completion"
        return await post_completion(self._session, url, request, limits, self, pictures=self._engine.pictures)

    @staticmethod
    def passage(answer: Answer, request: CompletionRequest) -> Passage:
        """Return the bytes of an answer instead of its chunks."""
        return Passage(answer, request.seed)

    async def blame(self, what: str) -> MlxsupError:
        """Say why an answer broke off: asked to stop, dead, or alive and misbehaving."""
        if not self._interrupted.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(BLAME_WAIT):
                    await asyncio.shield(self._interrupted)
        if self._stopping.is_set():
            return Unloaded(f"{self.model.name} was unloaded while it answered", details={"model": self.model.name})
        if self.exit is not None or self._wedged:
            return self._unwanted_end()
        return self.testify(BadAnswer(f"the runner of {self.model.name} lives, but {what}"))

    def testify(self, error: MlxsupError) -> MlxsupError:
        """Add to an error that this runner caused what it said last, and whose it is."""
        said = {"model": self.model.name, "last_error": self.last_error, "last_words": self.last_words()}
        error.details = said | error.details
        return error

    # The one task

    async def run(self) -> None:
        """Load, serve until the process ends or `stop` is called, then leave nothing behind; reports by `notify`."""
        error: MlxsupError | None = None
        try:
            error = await self._serve()
            if error is not None:
                await self._end_or_tell(error)
        except asyncio.CancelledError:  # the loop is being torn down: no time for grace
            self.stop()
            self.kill_now()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._end_process()
        self._notify(RunnerGone(self.model.name, self.generation, error))

    async def _serve(self) -> MlxsupError | None:
        """Load and wait for the end; returns why it came, None when it was asked for."""
        try:
            await self._load()
            self._loaded = True
            self._notify(RunnerReady(self.model.name, self.generation, time.monotonic() - self.started))
            await race(self._notice_wedge(), self._interrupted)
        except Interrupted:
            pass
        except MlxsupError as error:
            return error
        except Exception as error:
            if is_shortage(error):
                return ResourceExhausted.of(f"cannot run {self.model.name}", error, model=self.model.name)
            log.exception("unexpected failure while running %s", self.model.name)
            return LoadFailed(f"unexpected failure: {error!r}", details={"model": self.model.name})
        return None if self._stopping.is_set() else self._unwanted_end()

    async def _notice_wedge(self) -> None:
        patience = Patience(
            interval=self.model.probe_interval,
            first_chunk=self.model.first_chunk_timeout,
            silence=self.model.silence_timeout,
        )
        self._give_up(await wedged(self.pulse, patience, self._still_answers))
        await self._interrupted

    async def _still_answers(self) -> bool | None:
        return self._probe is not None and await self._probe.is_answered(self.model.probe_timeout)

    def _give_up(self, why: str) -> None:
        """End a runner that lives and is of no use."""
        self._wedged = why
        self._interrupt()

    async def _end_or_tell(self, error: MlxsupError) -> None:
        """Clean up after a failure; where that takes its time, as with a child that ignores SIGTERM, tell of it first."""
        ending = asyncio.create_task(self._end_process(), name=f"mlxsup end {self.model.name}")
        done, _ = await asyncio.wait({ending}, timeout=TELL_AFTER)
        if not done:
            self._notify(RunnerFailing(self.model.name, self.generation, error))
        await ending

    async def _load(self) -> None:
        why = ""
        for attempt in range(1, ADDRESS_TRIES + 1):
            self._readiness = None
            try:
                return await self._try_load()
            except StrangerListens:
                why = "somebody else listens on its port"
            except Interrupted:
                if self._stopping.is_set() or self._wedged or self._output.cause != "port_in_use":
                    raise
                why = "its port was taken"
                self._addresses.refuse_hold(self.model.name)
            if attempt == ADDRESS_TRIES:
                break
            log.warning("%s: %s; trying another", self.model.name, why, extra=self._facts())
            await self._end_process()
            self.exit = None
            self._interrupted = asyncio.get_running_loop().create_future()
            if self._stopping.is_set():
                raise Interrupted
            self._output = OutputRecord(self._log_line, self._engine.noise)
        raise LoadFailed(
            f"{self.model.name}: {why}, {ADDRESS_TRIES} times in a row",
            details={"model": self.model.name, "stage": "address", "last_words": self.last_words()},
        )

    async def _try_load(self) -> None:
        with self._addresses.place(self.model.name, self._engine.transport(self.model)) as place:
            self.address = place.address
            await self._start_and_wait()

    async def _start_and_wait(self) -> None:
        assert self.address is not None
        ready_fd = await self._spawn(await in_thread(self._engine.launch, self.model, self.address))
        assert self._process is not None
        self._session = open_session(self.address, self.model.connect_timeout)
        self._probe = Probe(self.model, self._engine, self.address, self._session)
        self._readiness = Readiness(self.model, self._process, self.address, self._probe, self._load_timeout)
        if ready_fd is not None:  # kept open: who writes only after a probe has told us must not end by SIGPIPE
            self._ready_pipe = await listen_for_ready_byte(ready_fd, self._on_ready_byte)
        await self._readiness.wait(self._interrupted)

    async def _spawn(self, launch: Launch) -> int | None:
        """Start the process; returns the reading end of its ready pipe, if it has one."""
        env = environment.build(self.model, launch) | {SUPERVISOR_PID: str(os.getpid())}
        env = {**self._device_env, **env} if "CUDA_VISIBLE_DEVICES" in self.model.env else {**env, **self._device_env}
        await self._guard.ready()
        mark = self._guard.new_mark()
        reader, writer = os.pipe() if launch.wants_ready_fd else (None, None)
        try:
            self._process = await Process.spawn(
                launch.arguments(writer),
                env=env,
                cwd=self.model.cwd or None,
                mark=mark,
                output=self._output,
                pass_fds=() if writer is None else (writer,),
            )
        except BaseException:
            if reader is not None:
                os.close(reader)
            raise
        finally:
            if writer is not None:
                os.close(writer)
        self._guard.watch(self._process.pid)
        self._start_watch(self._process)
        log.info("started %s on %s", self.model.name, self.address, extra=self._facts())
        return reader

    def _start_watch(self, process: Process) -> None:
        self._watcher = asyncio.create_task(self._watch(process), name=f"mlxsup watch {self.model.name}")

    async def _watch(self, process: Process) -> None:
        try:
            self.exit = await process.watch()
        except (
            asyncio.CancelledError
        ):  # with every other task, as at the end of asyncio.run: somebody must see the exit
            if process.is_ours:
                self._start_watch(process)
            raise
        finally:
            self._interrupt()

    def _on_ready_byte(self) -> None:
        if self._readiness is not None:
            self._readiness.tell_ready()

    def _interrupt(self) -> None:
        """End what goes on. The news of a death goes out before anybody who used the runner can ask for it again."""
        if self._interrupted.done():
            return
        self._interrupted.set_result(None)
        if self._loaded and not self._stopping.is_set():
            self._notify(RunnerFailing(self.model.name, self.generation, self._unwanted_end()))

    async def _end_process(self) -> None:
        """Stop the process if it runs, see that nothing of it is left, give back what it held."""
        try:
            await self._end_and_see()
        except Exception:  # one runner's end must not be the end of all
            log.exception("unexpected failure while ending %s", self.model.name)

    async def _end_and_see(self) -> None:
        process, session, ready_pipe = self._process, self._session, self._ready_pipe
        if process is not None and not process.is_ours:
            return  # this is a child that the program has forked
        if process is not None:
            number = getattr(signal, self.model.stop_signal) if self.model.stop_signal else self._engine.stop_signal
            reaped = await process.stop(number, self.model.stop_grace)
            left = await process.sweep()
            while (not reaped or left != []) and not self._abandoned:
                if not reaped or left:
                    self._notify(RunnerStuck(self.model.name, self.generation, left or [process.pid]))
                reaped = await process.stop(signal.SIGKILL, self.model.stop_grace)
                left = await process.sweep()
            if self._watcher is not None:
                await asyncio.wait({self._watcher})
            self._guard.forget(process.pid)
        if ready_pipe is not None:
            ready_pipe.close()
        if session is not None:
            await session.close()
        if self.address is not None:
            self._addresses.forget(self.address)
        self._process = self._session = self._ready_pipe = None

    def _unwanted_end(self) -> MlxsupError:
        if self._wedged:
            kind, stage = (RunnerDied, {}) if self._loaded else (LoadFailed, {"stage": "loading"})
            told = f"the runner of {self.model.name} was ended: {self._wedged}"
            return self.testify(kind(told, details={"cause": "wedged", "reason": self._wedged, **stage}))
        if self.exit is None:
            return RunnerDied(f"lost track of the runner of {self.model.name}", details={"model": self.model.name})
        facts: dict[str, Any] = {"model": self.model.name, **self.exit.details()}
        if self._loaded:
            return RunnerDied(f"the runner of {self.model.name} died ({self.exit.describe()})", details=facts)
        return LoadFailed(
            f"{self.model.name} could not be loaded: its runner ended ({self.exit.describe()})",
            details={"stage": "loading", **facts},
        )

    def _log_line(self, stream: Stream, line: str, *, is_error: bool) -> None:
        pid = self._output.pid  # ours may not be known yet: a child may be quicker than who has started it
        facts = {**self._facts(), "pid": pid, "stream": stream}
        log.log(logging.WARNING if is_error else logging.INFO, line, extra=facts)

    def _facts(self) -> dict[str, Any]:
        return {"model": self.model.name, "pid": self.pid, "generation": self.generation}
