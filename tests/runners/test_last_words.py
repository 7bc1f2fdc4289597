"""What a child wrote just before its end is read before the end is told, however late the loop comes to its pipes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mlxsup.errors import LoadFailed, LoadTimeout, RunnerDied
from mlxsup.runners.output import SHOWN_HEAD, SHOWN_TAIL, shown
from mlxsup.testing import fake_runner
from tests.faults.house import collect, supervisor
from tests.waiting import LIMIT

from .children import Child, child, python

WRITES = """
    import os, sys
    sys.stdin.read(1)
    os.write(1, b"o" * 60000 + b"\\nthe last of stdout\\n")
    os.write(2, b"e" * 60000 + b"\\nerror: the last of stderr")
    os._exit(3)
"""


@asynccontextmanager
async def held_back(code: str) -> AsyncIterator[tuple[Child, int]]:
    """A child whose pipes nobody reads until its end has been seen; it begins when something is written to the descriptor."""
    stdin, start = os.pipe()
    try:
        async with child(python(code), stdin=stdin) as it:
            pumps = [transport for transport, *_ in it.process._pumps]
            for transport in pumps:
                transport.pause_reading()
            waited = it.process._child.wait

            async def wait() -> int:
                status = await waited()
                for transport in pumps:
                    transport.resume_reading()
                return status

            setattr(it.process._child, "wait", wait)  # noqa: B010 - its watcher has not begun yet
            yield it, start
    finally:
        os.close(stdin)
        os.close(start)


async def test_what_is_in_the_pipes_when_the_end_is_seen_is_read_first() -> None:
    async with held_back(WRITES) as (it, start):
        os.write(start, b"\n")
        async with asyncio.timeout(LIMIT):
            record = await it.process.wait()
        assert (record.code, record.last_error) == (3, "error: the last of stderr")
        assert record.last_words[-1] == "error: the last of stderr"
        assert ("stdout", "the last of stdout") in it.heard.lines


# Whose words they are


async def test_each_line_in_the_log_has_its_pid_from_the_first_to_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlxsup.runners.runner")
    entry = {"engine": "command", "memory": "1MiB", "command": ["/bin/sh", "-c", "echo $$ >&2; exit 3", "{port}"]}
    for _ in range(5):
        async with supervisor(m=entry) as sup:
            with pytest.raises(LoadFailed):
                await sup.load("m")
    async with supervisor(m=fake_runner("stderr@sigterm=late")) as sup:
        await sup.load("m")
        pid = sup.report("m").pid
        await sup.unload("m")
    logged: list[Any] = [record for record in caplog.records if hasattr(record, "stream")]
    said = [(record.getMessage(), record.pid) for record in logged]
    assert [message for message, _ in said[:-1]] == [str(pid) for _, pid in said[:-1]]
    assert len(said) == 6
    assert said[-1] == ("late", pid)
    assert {record.model for record in logged} == {"m"}


# Long ones


def test_of_a_long_line_both_ends_are_shown() -> None:
    assert shown("short") == "short"
    assert shown("x" * (SHOWN_HEAD + SHOWN_TAIL)) == "x" * (SHOWN_HEAD + SHOWN_TAIL)
    line = "a" * 1000 + "b" * 1000
    assert shown(line) == "a" * SHOWN_HEAD + " [...] " + "b" * SHOWN_TAIL


async def test_a_long_last_line_is_cut_in_the_message_and_whole_in_the_details() -> None:
    async with supervisor(
        died=fake_runner("flood@crash=0.005; crash@1"),
        failed=fake_runner("flood@crash=0.005; exit@loading"),
        late=fake_runner("flood@loading=0.005; load=forever", load_timeout="0.5s"),
    ) as sup:
        for model, kind in (("died", RunnerDied), ("failed", LoadFailed), ("late", LoadTimeout)):
            with pytest.raises(kind) as caught:
                await collect(sup, model)
            assert len(caught.value.message) < 700
            assert "xxx [...] xxx" in caught.value.message
            assert len(caught.value.details["last_error"]) > 5000
            assert len(sup.report(model).last_error) < 700
