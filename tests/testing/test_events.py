"""The recorder of events: what it has seen, and waiting for what it has not."""

from __future__ import annotations

import anyio
import pytest

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.testing import EventRecorder, fake_runner

pytestmark = pytest.mark.anyio


async def test_a_whole_life_is_recorded_in_order() -> None:
    async with Supervisor(parse({"models": {"m": fake_runner(), "n": fake_runner()}}, KEYS)) as sup:
        async with EventRecorder(sup) as recorder:
            await sup.load("m")
            await sup.unload("m")
            with anyio.fail_after(5):
                gone = await recorder.until("m", "stopped")
            assert recorder.states("m") == ["starting", "ready", "stopping", "stopped"]
            assert recorder.states("n") == []
            assert gone.reason == "gone"
        await sup.load("n")
        assert recorder.states("n") == []


async def test_the_same_state_may_be_waited_for_again() -> None:
    async with (
        Supervisor(parse({"models": {"m": fake_runner("crash@1")}}, KEYS)) as sup,
        EventRecorder(sup) as recorder,
    ):
        for times in (1, 2):
            with pytest.raises(Exception, match="died"):
                async for _ in sup.completion("m", prompt="p"):
                    pass
            with anyio.fail_after(5):
                failed = await recorder.until("m", "failed", times)
            assert failed.generation == times
