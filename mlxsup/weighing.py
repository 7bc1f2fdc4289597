"""Finds out what models need without waiting for a disk: each in a thread of its own, so that a path which hangs, as on a file
server that is gone, keeps nobody from loading another model, and nothing from ending.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress

from mlxsup import threads
from mlxsup.config import ModelSettings
from mlxsup.errors import LoadFailed, LoadTimeout, MlxsupError, ResourceExhausted
from mlxsup.machine import Weighed
from mlxsup.shortages import NoThreadError

log = logging.getLogger(__name__)

Weigh = Callable[[ModelSettings], Weighed]
"""Says what a model needs, or raises why it does not; blocks for as long as its files take."""

ASK_AGAIN = 5.0
"""Seconds after which it may be asked again for a model whose files hang."""


class Scales:
    """Weighs models, each once at a time: while its files hang, they are not read again, whoever asks for it."""

    def __init__(self, weigh: Weigh) -> None:
        self._weigh = weigh
        self._readings: dict[str, _Reading] = {}

    async def weigh(self, model: ModelSettings, limit: float) -> Weighed:
        """Return what a model needs; `limit` is seconds since its files began to be read, by whomever.

        Raises:
            LoadTimeout: its files hang.
            ResourceExhausted: there is no thread to be had.
            MlxsupError: it cannot be loaded, or its files do not tell.
        """
        reading = self._reading(model)
        left = reading.began + limit - time.monotonic()
        await asyncio.wait([reading.outcome], timeout=max(0.0, left))
        if not reading.outcome.done():
            raise _hangs(model, reading.path, time.monotonic() - reading.began)
        outcome = reading.outcome.result()
        if isinstance(outcome, MlxsupError):
            raise outcome.again() from outcome
        if isinstance(outcome, Exception):
            log.error("unexpected failure while weighing %s", model.name, exc_info=outcome)
            raise LoadFailed(f"unexpected failure: {outcome!r}", details={"model": model.name}) from outcome
        return outcome

    def _reading(self, model: ModelSettings) -> _Reading:
        """Return the reading that is under way, if it is for the same configuration of the model, or begin one."""
        name = model.name
        found = self._readings.get(name)
        if found is not None and found.model == model:
            return found
        try:
            reading = _Reading(model, self._weigh)
        except NoThreadError as error:
            raise ResourceExhausted.of(f"cannot look at the files of {name}", error, model=name) from error
        reading.outcome.add_done_callback(lambda _: self._forget(name, reading))
        self._readings[name] = reading
        return reading

    def _forget(self, name: str, reading: _Reading) -> None:
        if self._readings.get(name) is reading:
            del self._readings[name]


class _Reading:
    """One look at a model's files, in a thread that nothing waits for: the end of the process takes it along."""

    def __init__(self, model: ModelSettings, weigh: Weigh) -> None:
        self.model = model
        self.path = model.path
        self.began = time.monotonic()
        self.outcome = threads.begin(self._run, weigh, name=f"mlxsup weighing {model.name}")

    def _run(self, weigh: Weigh) -> Weighed | Exception:
        try:
            self._visit_folder()
            return weigh(self.model)
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            return error if isinstance(error, Exception) else RuntimeError(repr(error))

    def _visit_folder(self) -> None:
        """Try the folder that the runner is started in: a child that hangs in its chdir would hold up the loop."""
        if self.model.cwd:
            self.path = self.model.cwd
            with suppress(ValueError):  # the start says why
                os.access(self.path, os.X_OK)
            self.path = self.model.path


def _hangs(model: ModelSettings, path: str, seconds: float) -> LoadTimeout:
    return LoadTimeout(
        f"{model.name}: what it needs is not known, as reading {path or 'its files'} has hung for {seconds:.1f} s;"
        " is its file server there?",
        retry_after=ASK_AGAIN,
        details={"stage": "weighing", "model": model.name, "path": path, "seconds": round(seconds, 3)},
    )
