"""Owns the live runners: hands events to the scheduler, one at a time, and carries out its effects."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import anyio
import anyio.abc
import psutil

from mlxsup import reporting
from mlxsup.config import ModelSettings, Settings
from mlxsup.engines import ENGINES
from mlxsup.errors import LoadTimeout, MlxsupError, ShuttingDown
from mlxsup.learnt import Learnt, Lesson
from mlxsup.leases import Lease
from mlxsup.machine import Machine, Weighed, environment
from mlxsup.policies import limits, policies
from mlxsup.records import Group, Records, sweep
from mlxsup.report import DeviceReport, Event, RunnerReport
from mlxsup.runners.addresses import AddressBook
from mlxsup.runners.guard import Guard
from mlxsup.runners.liveness import until_next
from mlxsup.runners.runner import Notice, Runner, RunnerFailing, RunnerGone, RunnerReady, RunnerStuck
from mlxsup.scheduling import effects as fx
from mlxsup.scheduling import events as ev
from mlxsup.scheduling.scheduler import Scheduler
from mlxsup.shortages import NoThreadError
from mlxsup.statefiles import state_directory
from mlxsup.threads import in_thread
from mlxsup.weighing import Scales

log = logging.getLogger(__name__)

OBSERVE_EVERY = 1.0
EXPLAIN_WAIT = 5.0
"""Seconds after which who only wants to know is told that a model's files hang."""

RECORD_AGAIN = 5.0
"""Seconds after which a record that could not be written, as on a full disk, is tried again."""

CLOSE_MARGIN = 15.0
"""Seconds beyond the longest drain and grace after which a shutdown gives up on a process that will not die."""


class Subscriber(Protocol):
    """Who is told of transitions."""

    def take(self, event: Event | None) -> None:
        """Take one transition; None is the end."""


Answer = Lease | None


class Registry:
    """All models of one supervisor. `run` must be running; everything else may be called from the loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._learnt = Learnt(state_directory())
        self._machine = Machine(self._learnt)
        self._scheduler = Scheduler(policies(settings, self._machine), settings.scheduler.queue, limits(settings))
        self._scales = Scales(self._machine.weigh)
        self._weighing: dict[str, anyio.CancelScope] = {}
        self._weighed: dict[str, Weighed] = {}
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
        self._look_asked = asyncio.Event()
        self._looking = asyncio.Lock()
        self._guard = Guard(self._groups_changed.set)
        self._records = Records(state_directory(), self._guard.mark, str(self._guard.folder))
        self._addresses = AddressBook(self._guard.sockets)

    # Questions of callers

    async def acquire(self, model: str, *, keep_alive: float | None = None) -> Lease:
        """Wait for a lease. A caller that is cancelled leaves the queue at once; a load that has begun goes on.

        `keep_alive` is seconds that the model shall stay after its last use (negative: for ever), until it is unloaded.

        Raises:
            QueueFull, ShuttingDown, Unloaded: the scheduler refused.
            LoadFailed, LoadTimeout, EngineUnavailable: the runner could not be brought up.
        """
        lease = await self._ask(lambda ticket: ev.Acquire(ticket, model, keep_alive), model)
        assert lease is not None  # the answer to Acquire is a grant
        return lease

    async def load(self, model: str, *, keep_alive: float | None = None) -> None:
        """Wait until the model is ready; `keep_alive` and what is raised are as for `acquire`."""
        await self._ask(lambda ticket: ev.Load(ticket, model, keep_alive), model)

    async def unload(self, model: str, *, force: bool) -> None:
        """Wait until the model's process is gone.

        Raises:
            Conflict: it is pinned, and `force` is not given.
        """
        await self._ask(lambda ticket: ev.Unload(ticket, model, force), model)

    def shut_down(self, *, force: bool) -> None:
        """Begin the end; `run` returns when nothing is left."""
        if self._give_up_at is None:
            models = [*self._settings.models.values(), *(runner.model for runner in self._runners.values())]
            longest = max((model.drain_timeout + model.stop_grace for model in models), default=0)
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

    async def reload(self, settings: Settings) -> None:
        """Take over another configuration; only what it changes is drained, and what goes on goes on.

        Raises:
            ConfigError: it names devices that are not here.
        """
        self._machine.check(settings)
        old, self._settings = self._settings, settings
        restart = {name for name, model in settings.models.items() if old.models.get(name, model) != model}
        self._post(self._configuration(frozenset(restart)))

    def _configuration(self, restart: frozenset[str] = frozenset()) -> ev.Reconfigure:
        settings = self._settings
        return ev.Reconfigure(
            policies=policies(settings, self._machine),
            queue=settings.scheduler.queue,
            limits=limits(settings),
            devices=self._machine.devices(settings),
            restart=restart,
        )

    @property
    def closing(self) -> bool:
        """Whether new work is refused."""
        return self._scheduler.closing

    async def explain(self, name: str) -> str:
        """Say what would happen if the model were asked for now, and why; weighs it and looks at what is free."""
        model = self._settings.models.get(name)
        weighed: ev.Weighed | ev.Unfit | None = None
        if model is not None and not self._scheduler.view(name).reserved:
            try:
                found = await self._scales.weigh(model, EXPLAIN_WAIT)
            except LoadTimeout as error:
                waits = error.details["seconds"] < self._load_timeout(model)
                return f"{'queued' if waits else 'refused'}: {error.message}"
            except MlxsupError as error:
                weighed = ev.Unfit(name, 0, error)
            else:
                weighed = found.event(name)
                await self._look(thorough=True)
        if name not in self._scheduler.models:
            return "refused: it is not configured any more"
        return self._scheduler.explain(name, time.monotonic(), weighed)

    def devices(self) -> list[DeviceReport]:
        """Return what each device has and who has it; touches nothing and waits for nothing."""
        return reporting.devices(self._scheduler.ledger)

    @property
    def models(self) -> list[str]:
        """The models there are; one that is not configured any more stays until its process is gone."""
        return self._scheduler.models

    def report(self, name: str) -> RunnerReport:
        """Return what is known of one model; touches nothing and waits for nothing."""
        runner = self._runners.get(name)
        model = self._settings.models.get(name) or (runner.model if runner is not None else None)
        assert model is not None  # only what runs outlives its configuration
        weighed = self._weighed.get(name)
        length = weighed.context_length if weighed is not None else 0
        return reporting.runner(model, self._scheduler.view(name), runner, length)

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
            await in_thread(self._clear_the_way)
            self._events.appendleft(ev.Start())
            self._events.appendleft(self._configuration())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._observe, name="mlxsup observer")
                tasks.start_soon(self._keep_records, name="mlxsup records")
                tasks.start_soon(self._look_when_asked, name="mlxsup looks")
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
            self._machine.close()
            with anyio.CancelScope(shield=True):
                await self._guard.close(self._learnt.write, self._records.close)

    def _clear_the_way(self) -> None:
        sweep(state_directory())
        self._records.open()
        self._learnt.open()
        self._machine.find_devices()
        self._machine.check(self._settings)

    async def _keep_records(self) -> None:
        """Write down which groups run, whenever that has changed, and what was learnt meanwhile."""
        while True:
            await self._groups_changed.wait()
            self._groups_changed.clear()
            groups = [Group(pgid, started) for pgid, started in self._guard.groups.items()]
            written = False
            with suppress(NoThreadError):
                written = await in_thread(self._records.write, groups, str(self._guard.folder))
                await in_thread(self._learnt.write)
            if not written:
                await asyncio.sleep(RECORD_AGAIN)
                self._groups_changed.set()

    async def _observe(self) -> None:
        """Look at what runs and at what is free, once a second, only while something runs or shall when there is room."""
        while True:
            await self._alive.wait()
            await asyncio.sleep(until_next(OBSERVE_EVERY))
            await self._look()  # once more when nothing runs: what was kept open for the last runners is let go
            if not (self._scheduler.live or self._scheduler.hungry or self._scheduler.expectant):
                self._alive.clear()

    async def _look_when_asked(self) -> None:
        """Look at memory that must come back, whenever the scheduler wants to know."""
        while True:
            await self._look_asked.wait()
            self._look_asked.clear()
            await self._look()

    async def _look(self, *, thorough: bool = False) -> None:
        """Look at all runners and at what is free, and tell the scheduler; thoroughly where somebody waits for memory."""
        async with self._looking:
            runners = {name: runner for name, runner in self._runners.items() if runner.pid > 0}
            watched = {name: runner.watched() for name, runner in runners.items()}
            thorough, expectant = thorough or self._scheduler.hungry, self._scheduler.expectant
            try:
                seen = await self._machine.look(watched, thorough=thorough, all_cards=expectant)
            except Exception as error:  # no descriptors, no threads, or a fault of ours: the next look may succeed
                ours = not isinstance(error, (OSError, NoThreadError, psutil.Error))
                log.warning("could not look at what is free and used: %s", error, exc_info=ours)
                return
        for name, sight in seen.sights.items():
            runners[name].note_sight(sight, seen.used.get(name, {}), seen.needed.get(name, {}))
        used = {name: (runners[name].generation, share) for name, share in seen.used.items()}
        self._post(ev.Sampled(seen.free, used))

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
            if self._scheduler.hungry or self._scheduler.expectant:
                self._alive.set()
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
            case fx.Weigh():
                if effect.model in self._weighing:
                    self._weighing[effect.model].cancel()  # nobody waits for the answer to an earlier question
                scope = self._weighing[effect.model] = anyio.CancelScope()
                tasks.start_soon(self._weigh, effect, scope, name=f"mlxsup weighing {effect.model}")
            case fx.Look():
                self._look_asked.set()
            case fx.Spawn():
                runner = self._runners[effect.model] = self._make_runner(effect)
                self._alive.set()
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
            case fx.Changed() | fx.Noticed():
                self._publish(effect)
            case fx.Forget():
                self._runners.pop(effect.model, None)
                self._weighed.pop(effect.model, None)
                if (weighing := self._weighing.pop(effect.model, None)) is not None:
                    weighing.cancel()  # another model of this name would take the answer for its own
            case fx.Closed():
                self._closed = True
                self._woken.set()

    async def _weigh(self, question: fx.Weigh, scope: anyio.CancelScope) -> None:
        """Find out what a model needs, after a look at what there is."""
        name = question.model
        model = self._settings.models.get(name)
        if model is None:
            return
        with scope:
            try:
                self._weighed[name] = weighed = await self._scales.weigh(model, self._load_timeout(model))
            except MlxsupError as error:
                self._post(ev.Unfit(name, question.attempt, error))
                return
        if not scope.cancelled_caught:
            await self._look(thorough=True)
            self._post(weighed.event(name, question.attempt))

    def _make_runner(self, spawn: fx.Spawn) -> Runner:
        model = self._settings.models[spawn.model]
        return Runner(
            model,
            ENGINES[model.engine],
            spawn.generation,
            load_timeout=self._load_timeout(model),
            guard=self._guard,
            addresses=self._addresses,
            notify=self._notice,
            shares=spawn.shares,
            device_env=environment(spawn.shares, chosen=bool(model.device)),
        )

    def _load_timeout(self, model: ModelSettings) -> float:
        return self._settings.scheduler.load_timeout if model.load_timeout is None else model.load_timeout

    def _notice(self, notice: Notice) -> None:
        match notice:
            case RunnerReady(model, generation, seconds):
                self._learn(model, seconds)
                self._post(ev.Ready(model, generation))
            case RunnerFailing(model, generation, error):
                self._post(ev.Failing(model, generation, error))
            case RunnerGone(model, generation, error):
                self._learn(model)
                self._post(ev.Gone(model, generation, error, random.random()))  # noqa: S311 - no secret
            case RunnerStuck(model, generation, pids):
                self._post(ev.Stuck(model, generation, pids))

    def _learn(self, name: str, seconds: float = 0.0) -> None:
        """Keep how long a load took, and what a runner that has worked used at most."""
        runner, weighed = self._runners[name], self._weighed.get(name)
        if weighed is None:
            return
        peak = sum(runner.peak.get(device, 0) for device in runner.shares) if runner.worked else 0
        if peak or seconds:
            self._learnt.keep(weighed.key, Lesson(memory=peak, seconds=round(seconds, 3), at=round(time.time())))
            self._groups_changed.set()

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

    def _publish(self, change: fx.Changed | fx.Noticed) -> None:
        runner = self._runners.get(change.model)
        event = Event(
            model=change.model,
            state=change.state,
            previous=change.previous if isinstance(change, fx.Changed) else change.state,
            generation=change.generation,
            at=time.time(),
            pid=runner.pid if runner is not None and runner.generation == change.generation else -1,
            reason=change.reason,
        )
        odd = isinstance(change, fx.Noticed) or change.state in ("failed", "stuck")
        level = logging.WARNING if odd else logging.INFO
        facts = {"model": event.model, "state": event.state, "generation": event.generation, "pid": event.pid}
        if event.model:
            log.log(level, "%s is %s: %s", event.model, event.state, event.reason, extra=facts)
        else:
            log.log(level, "%s", event.reason)
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
