"""A place that is granted to a caller who has just left is given back whole."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import pytest

from mlxsup.testing import EventRecorder, fake_runner
from tests.faults.house import collect, report, supervisor
from tests.waiting import LIMIT

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_runner_whose_caller_left_as_his_turn_came_counts_as_idle(turns: int) -> None:
    entry = fake_runner("wedge@end", probe_interval="0.05s", probe_timeout="0.1s")
    async with supervisor(m=entry) as sup, EventRecorder(sup) as recorder:

        async def use() -> None:
            async with sup.lease("m"):
                await asyncio.sleep(0)

        async with sup.lease("m"):
            waiting = asyncio.create_task(use())
            while report(sup).queue == 0:
                await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert report(sup).leases == 0
        await collect(sup)  # its last act: from here on its health gets no answer
        with anyio.fail_after(LIMIT):
            event = await recorder.until("m", "failed")
        assert "did not answer 3 probes" in event.reason
