"""Tells a program from the children that it forks: what it owns is not theirs."""

from __future__ import annotations

import os


class Owner:
    """The process that made this; a child that it forks has a copy, and knows by it that it is another."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the owner itself."""
        return os.getpid() == self.pid
