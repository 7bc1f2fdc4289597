"""Owns the live runners: hands events to the scheduler, one at a time, and carries out its effects."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import anyio
import anyio.abc

from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES
from mlxsup.errors import MlxsupError, ShuttingDown
from mlxsup.records import Group, Records, state_directory, sweep
from mlxsup.report import DeviceMemory, Event, MemoryReport, RunnerReport
from mlxsup.runners.addresses import AddressBook
from mlxsup.runners.footprint import Observer
from mlxsup.runners.guard import Guard
from mlxsup.runners.runner import Notice, Runner, RunnerFailing, RunnerGone, RunnerReady, RunnerStuck
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.scheduler import Policy, Scheduler

log = logging.getLogger(__name__)

OBSERVE_EVERY = 1.0
RECORD_AGAIN = 5.0
"""Seconds after which a record that could not be written, as on a full disk, is tried again."""
HOST_DEVICE = "metal" if sys.platform == "darwin" else "cpu"

CLOSE_MARGIN = 15.0
"""Seconds beyond the longest drain and grace after which a shutdown gives up on a process that will not die."""


class Lease:
    """The right to use a model's runner, from grant to `release`; the runner is not stopped meanwhile."""

    def __init__(self, runner: Runner, release: Callable[[], None]) -> None:
        self.runner = runner
        self._release = release
        self._held = True
        runner.pulse.users += 1
        runner.pulse.beat()

    @property
    def model(self) -> str:
        """The model's name."""
        return self.runner.model.name

    @property
    def base_url(self) -> str:
        """The runner's HTTP base, for requests of your own."""
        return self.runner.address.base_url if self.runner.address else ""

    @property
    def socket(self) -> str:
        """The unix socket behind `base_url`, "" when that is a port."""
        return self.runner.address.socket if self.runner.address else ""

    def release(self) -> None:
        """Give it back; twice is once."""
        if self._held:
            self._held = False
            self.runner.pulse.users -= 1
            self._release()


class Subscriber(Protocol):
    """Who is told of transitions."""

    def take(self, event: Event | None) -> None:
        """Take one transition; None is the end."""


Answer = Lease | None


class Registry:
    """All models of one supervisor. `run` must be running; everything else may be called from the loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        policies = {name: _policy(model, settings) for name, model in settings.models.items()}
        self._scheduler = Scheduler(policies, settings.scheduler.queue)
        self._runners: dict[str, Runner] = {}
        self._tickets = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._tasks: anyio.abc.TaskGroup | None = None
        self._crash: Exception | None = None
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._closed = False
        self._give_up_at: float | None = None
        self._alive = asyncio.Event()
        self._groups_changed = asyncio.Event()
        self._guard = Guard(self._groups_changed.set)
        self._records = Records(state_directory(), self._guard.mark, str(self._guard.folder))
        self._addresses = AddressBook(self._guard.folder)

    # Questions of callers

    async def acquire(self, model: str) -> Lease:
        """Wait for a lease. A caller that is cancelled leaves the queue at once; the load it asked for goes on.

        Raises:
            QueueFull, ShuttingDown, Unloaded: the scheduler refused.
            LoadFailed, LoadTimeout, EngineUnavailable: the runner could not be brought up.
        """
        lease = await self._ask(lambda ticket: ev.Acquire(ticket, model), model)
        assert lease is not None  # the answer to Acquire is a grant
        return lease

    async def load(self, model: str) -> None:
        """Wait until the model is ready; raises as `acquire` does."""
        await self._ask(lambda ticket: ev.Load(ticket, model), model)

    async def unload(self, model: str, *, force: bool) -> None:
        """Wait until the model's process is gone."""
        await self._ask(lambda ticket: ev.Unload(ticket, model, force), model)

    def shut_down(self, *, force: bool) -> None:
        """Begin the end; `run` returns when nothing is left."""
        if self._give_up_at is None:
            longest = max(
                (model.drain_timeout + model.stop_grace for model in self._settings.models.values()), default=0
            )
            self._give_up_at = asyncio.get_running_loop().time() + longest + CLOSE_MARGIN
            self._woken.set()
        self._post(ev.Shutdown(force=force))

    def subscribe(self, subscriber: Subscriber) -> None:
        """Tell `subscriber` of each transition, and None at the end; one that is dropped is forgotten."""
        if self._closed:
            subscriber.take(None)
        else:
            self._subscribers.add(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Tell it no more."""
        self._subscribers.discard(subscriber)

    @property
    def closing(self) -> bool:
        """Whether new work is refused."""
        return self._scheduler.closing

    def report(self, name: str) -> RunnerReport:
        """Return what is known of one model; touches nothing and waits for nothing."""
        model, view = self._settings.models[name], self._scheduler.view(name)
        runner = self._runners.get(name)
        exit_record = runner.exit if runner is not None else None
        return RunnerReport(
            model=name,
            engine=model.engine,
            path=model.path,
            aliases=list(model.aliases),
            state=view.state,
            pid=runner.pid if runner is not None else -1,
            address=str(runner.address) if runner is not None and runner.pid > 0 else "",
            progress=runner.progress if runner is not None and view.state == "starting" else None,
            memory=_memory(runner),
            leases=view.leases,
            queue=view.waiting,
            started=_wall(runner.started) if runner is not None and runner.pid > 0 else None,
            last_used=_wall(view.last_used),
            expires=_wall(view.expires),
            exits=view.exits,
            exit_code=exit_record.code if exit_record is not None else None,
            exit_signal=exit_record.signal if exit_record is not None else None,
            last_error=_last_error(view.error, runner),
        )

    def last_words(self, name: str) -> list[str]:
        """Return the kept error output of the model's present or last process."""
        runner = self._runners.get(name)
        return runner.last_words() if runner is not None else []

    # The owner task

    async def run(self, started: asyncio.Event) -> None:
        """Own the tasks of all runners until the shutdown is complete.

        Raises:
            MlxsupError: the shutdown gave up on a process that will not die; its pids are in the message.
        """
        try:
            await asyncio.to_thread(self._clear_the_way)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._observe, name="mlxsup observer")
                tasks.start_soon(self._keep_records, name="mlxsup records")
                self._tasks = tasks
                self._handle_events()
                started.set()
                await self._until_closed()
                for runner in self._runners.values():
                    runner.abandon()
                tasks.cancel_scope.cancel()
            if self._crash is not None:
                raise self._crash
            if left := [runner.pid for runner in self._runners.values() if runner.pid > 0]:
                raise MlxsupError(f"gave up on processes that do not die: {left}", details={"pids": left})
        finally:
            self._end()
            with anyio.CancelScope(shield=True):
                await self._guard.close()
                await asyncio.to_thread(self._records.close)

    def _clear_the_way(self) -> None:
        sweep(state_directory())
        self._records.open()

    async def _keep_records(self) -> None:
        """Write down which groups run, whenever that has changed."""
        while True:
            await self._groups_changed.wait()
            self._groups_changed.clear()
            groups = [Group(pgid, started) for pgid, started in self._guard.groups.items()]
            if not await asyncio.to_thread(self._records.write, groups):
                await asyncio.sleep(RECORD_AGAIN)
                self._groups_changed.set()

    async def _observe(self) -> None:
        """Look at what runs, once a second, only while something does."""
        observer = Observer()
        while True:
            await self._alive.wait()
            await asyncio.sleep(OBSERVE_EVERY)
            runners = [runner for runner in self._runners.values() if runner.pid > 0]
            if not runners:
                self._alive.clear()
            sights = await asyncio.to_thread(observer.look, [runner.pid for runner in runners])
            for runner, sight in zip(runners, sights, strict=True):
                runner.note_sight(sight)

    async def _until_closed(self) -> None:
        """Wait for the end of the shutdown, at most as long as that may take."""
        while not self._closed:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._give_up_at):
                    await self._woken.wait()
            self._woken.clear()
            if self._give_up_at is not None and asyncio.get_running_loop().time() >= self._give_up_at:
                return

    def _post(self, event: ev.Event) -> None:
        """Hand an event to the scheduler and carry out what it decides, in this very step: a report never lags behind.

        Events that this causes are handled after it, in their order: one at a time, whoever posts them.
        """
        self._events.append(event)
        self._handle_events()

    def _handle_events(self) -> None:
        if self._handling or self._tasks is None or self._closed:
            return
        self._handling = True
        try:
            while self._events:
                for effect in self._scheduler.handle(self._events.popleft(), time.monotonic()):
                    self._carry_out(effect, self._tasks)
            self._set_timer()
        except Exception as error:  # a bug: the owner task raises it, not whoever came by
            log.exception("the registry has crashed")
            self._crash = error
            self._end()
            self._woken.set()
        finally:
            self._handling = False

    def _carry_out(self, effect: fx.Effect, tasks: anyio.abc.TaskGroup) -> None:
        match effect:
            case fx.Spawn():
                runner = self._make_runner(effect.model, effect.generation)
                self._runners[effect.model] = runner
                tasks.start_soon(runner.run, name=f"mlxsup runner {effect.model}")
            case fx.Stop():
                self._runners[effect.model].stop()
            case fx.Grant():
                self._grant(effect)
            case fx.Done():
                self._tell_done(effect.ticket)
            case fx.Reject():
                future = self._answers.pop(effect.ticket, None)
                if future is not None and not future.done():
                    future.set_exception(effect.error)
            case fx.Changed():
                self._publish(effect)
            case fx.Closed():
                self._closed = True
                self._woken.set()

    def _make_runner(self, name: str, generation: int) -> Runner:
        model = self._settings.models[name]
        timeout = self._settings.scheduler.load_timeout if model.load_timeout is None else model.load_timeout
        return Runner(
            model,
            ENGINES[model.engine],
            generation,
            load_timeout=timeout,
            overhead=self._settings.scheduler.overhead,
            guard=self._guard,
            addresses=self._addresses,
            notify=self._notice,
        )

    def _notice(self, notice: Notice) -> None:
        match notice:
            case RunnerReady(model, generation):
                self._alive.set()
                self._post(ev.Ready(model, generation))
            case RunnerFailing(model, generation, error):
                self._post(ev.Failing(model, generation, error))
            case RunnerGone(model, generation, error):
                self._post(ev.Gone(model, generation, error))
            case RunnerStuck(model, generation, pids):
                self._post(ev.Stuck(model, generation, pids))

    def _grant(self, grant: fx.Grant) -> None:
        future = self._answers.pop(grant.ticket, None)
        # Who has just left has a Cancel on its way, which gives the place back.
        if future is not None and not future.done():
            release = ev.Release(grant.ticket, grant.model)
            future.set_result(Lease(self._runners[grant.model], lambda: self._post(release)))

    def _tell_done(self, ticket: int) -> None:
        future = self._answers.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(None)

    async def _ask(self, question: Callable[[int], ev.Event], model: str) -> Answer:
        if self._closed:
            raise ShuttingDown("this supervisor is closed")
        ticket = next(self._tickets)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[ticket] = future
        self._post(question(ticket))
        try:
            return await future
        except asyncio.CancelledError:
            self._answers.pop(ticket, None)
            lease = future.result() if future.done() and not future.cancelled() and not future.exception() else None
            if lease is not None:  # granted in the very moment in which its caller left
                lease.release()
            else:
                self._post(ev.Cancel(ticket, model))
            raise

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._scheduler.wake_at()
        if at is not None:
            delay = max(0.0, at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._post, ev.Tick())

    def _publish(self, change: fx.Changed) -> None:
        runner = self._runners.get(change.model)
        event = Event(
            model=change.model,
            state=change.state,
            previous=change.previous,
            generation=change.generation,
            at=time.time(),
            pid=runner.pid if runner is not None and runner.generation == change.generation else -1,
            reason=change.reason,
        )
        level = logging.WARNING if change.state in ("failed", "stuck") else logging.INFO
        facts = {"model": event.model, "state": event.state, "generation": event.generation, "pid": event.pid}
        log.log(level, "%s is %s: %s", event.model, event.state, event.reason, extra=facts)
        for subscriber in list(self._subscribers):
            subscriber.take(event)

    def _end(self) -> None:
        """Whatever happened: kill what still runs, leave no caller waiting, no timer set."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for runner in self._runners.values():
            runner.kill_now()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ShuttingDown("this supervisor is closed"))
        self._answers.clear()
        for subscriber in list(self._subscribers):
            subscriber.take(None)
        self._subscribers.clear()


def _policy(model: ModelSettings, settings: Settings) -> Policy:
    common = settings.scheduler
    own = ENGINES[model.engine].default_concurrency
    return Policy(
        keep_alive=common.keep_alive if model.keep_alive is None else model.keep_alive,
        concurrency=own if model.concurrency is None else model.concurrency,
        queue=common.queue if model.queue is None else model.queue,
        drain_timeout=model.drain_timeout,
    )


def _memory(runner: Runner | None) -> MemoryReport:
    if runner is None:
        return MemoryReport()
    used = DeviceMemory(
        estimated=runner.estimated_memory, measured=runner.memory if runner.pid > 0 else 0, peak=runner.peak_memory
    )
    return MemoryReport(estimated=used.estimated, measured=used.measured, peak=used.peak, devices={HOST_DEVICE: used})


def _wall(monotonic: float | None) -> float | None:
    return None if monotonic is None else round(time.time() - time.monotonic() + monotonic, 3)


def _last_error(error: MlxsupError | None, runner: Runner | None) -> str:
    if error is not None:
        return error.message
    return runner.last_error if runner is not None else ""
