"""The right to use a runner, as callers hold it."""

from __future__ import annotations

from collections.abc import Callable

from mlxsup.runners.runner import Runner


class Lease:
    """The right to use a model's runner, from grant to `release`; the runner is not stopped meanwhile."""

    def __init__(self, runner: Runner, release: Callable[[], None]) -> None:
        self.runner = runner
        self._release = release
        self._held = True
        runner.pulse.users += 1
        runner.pulse.ask()
        runner.worked = True

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
