"""SIGHUP: the configuration is read once more and taken over; where that fails, the log says why and the old one stays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from mlxsup.config import Settings
from mlxsup.daemon.systemd import notify
from mlxsup.errors import ConfigError, MlxsupError
from mlxsup.supervisor import Supervisor
from mlxsup.threads import begin

READ_LIMIT: Final = 10.0
"""Seconds that reading the configuration may take."""

_log = logging.getLogger("mlxsup.daemon")


async def reload_on_hangup(
    sup: Supervisor, read: Callable[[], Settings], hung_up: asyncio.Event, *, limit: float = READ_LIMIT
) -> None:
    """Reload whenever the event is set, for as long as this runs.

    Args:
        sup: takes the configuration over.
        read: reads it again, called in a thread; may raise what reading it raised at the start.
        hung_up: from `signals.hangups`.
        limit: seconds that `read` may take. One that takes longer is given up; until it has returned, none is begun.
    """
    server = sup.settings.server
    reader = _Reader(read, limit)
    while True:
        await hung_up.wait()
        hung_up.clear()
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            settings = await reader.read()
            await sup.reload(settings)
        except (MlxsupError, OSError) as error:
            _log.error("SIGHUP: the configuration stays as it was: %s", error)
        except Exception:  # noqa: BLE001 - whatever it is, the next SIGHUP must be heard
            _log.exception("SIGHUP: the configuration stays as it was, for a reason that nobody expected")
        else:
            _log.info("SIGHUP: the configuration is taken over; models: %d", len(settings.models))
            if settings.server != server:
                _log.warning("SIGHUP: what has changed in [server] is taken over by a restart only")
        notify("READY=1")


class _Reader:
    """Reads in a thread that may hang for good, as on a file server that is gone; there is never more than one."""

    def __init__(self, read: Callable[[], Settings], limit: float) -> None:
        self._read = read
        self._limit = limit
        self._begun: asyncio.Future[Settings] | None = None

    async def read(self) -> Settings:
        if self._begun is not None and not self._begun.done():
            raise ConfigError("reading it hangs since an earlier SIGHUP; send another once its disk answers")
        self._begun = begin(self._read)
        self._begun.add_done_callback(_look)
        await asyncio.wait({self._begun}, timeout=self._limit)
        if not self._begun.done():
            raise ConfigError(f"reading it has not ended within {self._limit:g} s")
        return self._begun.result()


def _look(read: asyncio.Future[Settings]) -> None:
    """Look at the error, if any: of one that comes too late for anybody asyncio would complain."""
    if not read.cancelled():
        read.exception()
