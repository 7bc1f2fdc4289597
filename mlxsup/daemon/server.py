"""The life of the daemon: listen, supervise, serve, and end in order when a signal says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Final

import uvloop

from mlxsup._version import __version__
from mlxsup.api import create_app, serving
from mlxsup.config import Listen, Settings
from mlxsup.daemon import heap
from mlxsup.daemon import logging as daemon_logging
from mlxsup.daemon.addresses import is_local, written
from mlxsup.daemon.listen import listening
from mlxsup.daemon.reloading import reload_on_hangup
from mlxsup.daemon.signals import captured, hangups
from mlxsup.daemon.systemd import notify, report_life
from mlxsup.supervisor import Supervisor

_LAST_BYTES: Final = 2.0
"""Seconds for answers that are finished but not yet read by their clients, once everything else has ended."""

_log = logging.getLogger("mlxsup.daemon")


def serve(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Run the daemon until SIGTERM or SIGINT; return its exit code. At SIGHUP it takes over what `reread` returns.

    The first signal ends it in order: new work is refused, work in flight may end, all runners are stopped. A second one
    does not wait for work in flight.

    Raises:
        Conflict: an address is taken.
        ConfigError: an address cannot be listened on.
    """
    heap.share_one()
    daemon_logging.configure()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, reread))


class _Stop:
    """What the signals have asked for so far."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()

    def on_terminal_gone(self) -> None:
        if not self.asked.is_set():
            _log.info("SIGHUP: the terminal is gone: stopping")
            self.asked.set()

    def on_signal(self, which: signal.Signals, count: int) -> None:
        if count == 1:
            _log.info("%s: stopping; once more to not wait for work in flight", which.name)
            self.asked.set()
        elif not self.forced.is_set():
            _log.warning("%s: stopping at once", which.name)
            self.forced.set()


async def _serve(settings: Settings, reread: Callable[[], Settings]) -> int:
    stop = _Stop()
    with captured(stop.on_signal), hangups(stop.on_terminal_gone) as hung_up:
        async with (
            _beside(report_life()),
            listening(settings.server.listen) as sockets,
            Supervisor(settings) as sup,
            _beside(_force(sup, stop), _notice_end(sup, stop), reload_on_hangup(sup, reread, hung_up)),
            serving(create_app(sup), sockets, settings.server, last_bytes=_LAST_BYTES),
        ):
            _announce(settings, sockets)
            notify("READY=1")
            await stop.asked.wait()
            notify("STOPPING=1")
            await sup.drain()  # the API still answers: new work is told that we are closing
    _log.info("stopped")
    return 0


async def _force(sup: Supervisor, stop: _Stop) -> None:
    await stop.forced.wait()
    await sup.drain(force=True)


async def _notice_end(sup: Supervisor, stop: _Stop) -> None:
    """Stop the daemon if the supervisor ends by itself: it has crashed, and leaving it raises why."""
    async for _ in sup.events():
        pass
    stop.asked.set()


@contextlib.asynccontextmanager
async def _beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _announce(settings: Settings, sockets: Iterable[socket.socket]) -> None:
    names = []
    for sock in sockets:
        name = sock.getsockname()
        address = Listen(path=name) if isinstance(name, str) else Listen(host=name[0], port=name[1])
        names.append(written(address))
        if not is_local(address):
            _log.warning("whoever reaches %s may use every model: there are no keys", written(address))
    facts = {"listen": names, "config": str(settings.source), "models": sorted(settings.models), "pid": os.getpid()}
    _log.info("mlxsup %s serves on %s", __version__, ", ".join(names), extra=facts)
