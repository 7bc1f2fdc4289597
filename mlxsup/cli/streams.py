"""Makes stdin, stdout and stderr fit to be used, whatever this program was started with; what goes to them, and when they fail."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import suppress

import msgspec


def make_usable() -> None:
    """Open what is closed of the three, and let their writing never fail for a character that they cannot show.

    Whoever opens a file next would be given the number of a closed one; for a child that is its stdin or stderr.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as we do
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_line(found: object) -> str:
    """Return a line of JSON for stdout, in ASCII: any name and any text, whatever the stream's encoding."""
    return json.dumps(msgspec.to_builtins(found), separators=(",", ":"), allow_nan=False) + "\n"


def give_up_stdout() -> None:
    """Drop what stdout does not take, so that the end of the program does not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        with suppress(OSError):
            sys.stdout.flush()
