"""A model's memory is known before its process exists: what cannot fit is refused with figures, and nothing is spawned."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlxsup import Supervisor, host
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.errors import DoesNotFit, InvalidRequest, LoadFailed
from mlxsup.learnt import Lesson
from mlxsup.scheduling.scheduler import Limits
from mlxsup.testing import fake_runner
from tests import waiting

from .weights.making import safetensors

pytestmark = pytest.mark.anyio
GIB = 1 << 30
LIMIT = 15.0
until = functools.partial(waiting.until, limit=LIMIT)


def supervisor(overhead: str = "0", **model: Any) -> Supervisor:
    return Supervisor(parse({"scheduler": {"overhead": overhead}, "models": {"m": model}}, KEYS))


async def test_what_never_fits_is_refused_at_once_and_for_good(tmp_path: Path) -> None:
    record = tmp_path / "record"
    async with supervisor(**fake_runner(f"record={record}", memory="4096GiB")) as sup:
        with pytest.raises(
            DoesNotFit, match=r"model requires 4\.0 TiB but only .* are available \(after 457.* overhead\)"
        ) as caught:
            await sup.load("m")
        assert caught.value.details["permanent"]
        assert caught.value.details["required"] == 4096 * GIB
        assert caught.value.status == 507
        assert sup.report("m").state == "failed"
    assert not record.exists()


async def test_overhead_is_kept_free_and_a_negative_remainder_is_none() -> None:
    async with supervisor("4096GiB", **fake_runner()) as sup:
        with pytest.raises(DoesNotFit, match=r"only 0 B are available \(after 4\.0 TiB overhead\)"):
            await sup.load("m")


async def test_what_does_not_fit_now_may_fit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with supervisor(**fake_runner()) as sup:
        with monkeypatch.context() as full:
            full.setattr(host.Gauge, "free", lambda _: 0)
            load = asyncio.create_task(sup.load("m"))
            await until(lambda: sup.report("m").waits_for_memory)
            assert "queued for a moment, then refused: model requires" in await sup.explain("m")
        with anyio.fail_after(LIMIT):
            await load  # nothing runs, and yet it is seen that there is room


async def test_what_other_programs_do_not_give_back_is_refused_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxsup.registry.limits", lambda _settings: Limits(patience=0.2))
    async with supervisor(**fake_runner()) as sup:
        with monkeypatch.context() as full:
            full.setattr(host.Gauge, "free", lambda _: 0)
            with pytest.raises(DoesNotFit, match="other programs hold what is missing") as caught:
                await sup.load("m")
        assert "permanent" not in caught.value.details
        assert caught.value.retry_after
        await sup.load("m")


async def test_what_was_learnt_beyond_the_device_refuses_nobody(tmp_path: Path) -> None:
    weights = tmp_path / "m.safetensors"
    weights.write_bytes(safetensors({"w": ("F32", [10])}))
    entry = fake_runner(path=str(weights))
    del entry["memory"]
    async with supervisor(**entry) as sup:
        await sup.load("m")
        await sup.unload("m")
        registry = sup._registry()
        registry._learnt.keep(registry._weighed["m"].key, Lesson(memory=4096 * GIB, at=1e9))
        assert (await sup.explain("m")).startswith("loaded at once")
        await sup.load("m")
        (device,) = sup.status().devices
        assert 0.5 * device.total < sup.report("m").memory.estimated <= device.total - device.kept


async def test_the_refusal_says_where_its_figure_comes_from(tmp_path: Path) -> None:
    weights = tmp_path / "m.safetensors"
    weights.write_bytes(safetensors({"w": ("F32", [10])}))
    entry = fake_runner(path=str(weights))
    del entry["memory"]
    async with Supervisor(parse({"devices": {"cpu": "600MiB"}, "models": {"m": entry}}, KEYS)) as sup:
        with pytest.raises(DoesNotFit, match=r"; its need is estimated from its files: models\.m\.memory overrules"):
            await sup.load("m")
        registry = sup._registry()
        weighed = await asyncio.to_thread(registry._machine.weigh, registry._settings.models["m"])
        registry._learnt.keep(weighed.key, Lesson(memory=GIB, at=1e9))
        with pytest.raises(
            DoesNotFit, match=r"is learnt \(last load 2001-09-0.\), .*: models\.m\.memory .*learnt\.json"
        ):
            await sup.load("m")


async def test_the_need_is_in_the_report_before_and_while_it_runs() -> None:
    async with supervisor(**fake_runner(memory="70MiB")) as sup:
        await sup.load("m")
        memory = sup.report("m").memory
        assert memory.estimated == 70 << 20
        assert [device.estimated for device in memory.devices.values()] == [70 << 20]


async def test_a_path_that_tells_nothing_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    entry = fake_runner(path=str(tmp_path))
    del entry["memory"]
    async with supervisor(**entry) as sup:
        with pytest.raises(
            LoadFailed, match=r"model\.safetensors: .*; or say what it needs: models\.m\.memory"
        ) as caught:
            await sup.load("m")
        assert caught.value.permanent


async def test_a_picture_beyond_what_was_reserved_names_the_key() -> None:
    async with supervisor(engine="imagegen", path="builtin:emoji", max_pixels=64 * 64) as sup:
        with pytest.raises(InvalidRequest, match=r"128 x 64 is more than the 4096 pixels .* models\.m\.max_pixels"):
            async for _ in sup.completion("m", prompt="a red heart", width=128, height=64):
                pass
        chunks = [chunk async for chunk in sup.completion("m", prompt="a red heart", width=64, height=64, steps=1)]
        assert chunks[-1].done
