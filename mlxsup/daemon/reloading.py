"""SIGHUP: the configuration is read once more and taken over; where that fails, the log says why and the old one stays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from mlxsup.config import Settings
from mlxsup.daemon.systemd import notify
from mlxsup.errors import MlxsupError
from mlxsup.supervisor import Supervisor

_log = logging.getLogger("mlxsup.daemon")


async def reload_on_hangup(sup: Supervisor, read: Callable[[], Settings], hung_up: asyncio.Event) -> None:
    """Reload whenever the event is set, for as long as this runs.

    Args:
        sup: takes the configuration over.
        read: reads it again, called in a thread; may raise what reading it raised at the start.
        hung_up: from `signals.hangups`.
    """
    while True:
        await hung_up.wait()
        hung_up.clear()
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        await _reload(sup, read)
        notify("READY=1")


async def _reload(sup: Supervisor, read: Callable[[], Settings]) -> None:
    server = sup.settings.server
    try:
        settings = await asyncio.to_thread(read)
        await sup.reload(settings)
    except (MlxsupError, OSError) as error:
        _log.error("SIGHUP: the configuration stays as it was: %s", error)
        return
    _log.info("SIGHUP: the configuration is taken over; models: %d", len(settings.models))
    if settings.server != server:
        _log.warning("SIGHUP: what has changed in [server] is taken over by a restart only")
