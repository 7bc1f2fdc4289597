"""Gives each runner an address that nobody else can have: a unix socket in a private folder, or a held loopback port."""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mlxsup.engines import Address
from mlxsup.engines.base import Transport


class Place:
    """One address while its runner starts; leaving the context gives up the hold on its port."""

    def __init__(self, address: Address, hold: socket.socket | None = None) -> None:
        self.address = address
        self._hold = hold

    @property
    def held(self) -> bool:
        """Whether the port is held, so that a program which does not share ports cannot bind it."""
        return self._hold is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hold is not None:
            self._hold.close()


class AddressBook:
    """Addresses of one supervisor's runners."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        """`folder` returns the one for sockets, and sees to it that it is there."""
        self._folder = folder
        self._numbers = itertools.count(1)
        self._refused: set[str] = set()

    def place(self, model: str, transport: Transport) -> Place:
        """Return a new address for a runner of `model`.

        On Linux a port is held bound until the runner listens on it, with both options under which others may share it: a
        runner that sets either of them gets in. One that sets neither reports the address in use; after `refuse_hold` its
        model's ports are no longer held. What makes a port safe is the check of who listens.

        Raises:
            LoadFailed: the folder for sockets is gone and cannot be made anew.
        """
        if transport == "unix":
            return Place(Address(socket=str(self._folder() / f"{next(self._numbers)}.sock")))
        hold = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holding = sys.platform == "linux" and model not in self._refused
        try:
            if holding:
                hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            hold.bind(("127.0.0.1", 0))
            address = Address(port=hold.getsockname()[1])
        except BaseException:
            hold.close()
            raise
        if not holding:
            hold.close()
        return Place(address, hold if holding else None)

    def refuse_hold(self, model: str) -> None:
        """Remember that this model's program cannot bind a held port."""
        self._refused.add(model)

    @staticmethod
    def forget(address: Address) -> None:
        """Remove what a dead runner left of its address: its socket file."""
        if address.socket:
            with suppress(OSError):  # it never made one, or its folder is gone or not ours any more
                Path(address.socket).unlink()
