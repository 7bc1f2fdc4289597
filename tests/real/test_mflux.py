"""mflux through the whole of it: a supervisor, the runner in the environment that has mflux, and a model of its classes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from mlxsup import CompletionChunk, Supervisor
from mlxsup.errors import LoadFailed, UnsupportedParameter
from mlxsup.imagegen.pipelines.mflux.folders import _SAVED, identify
from tests.faults.house import report
from tests.real.conftest import PATIENCE, supervisor, told
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(PATIENCE / 0.8), pytest.mark.loops("asyncio")]
BOTH_LOOPS = pytest.mark.loops("asyncio", "uvloop")
ORDER: dict[str, Any] = {"prompt": "a red heart", "width": 64, "height": 64, "steps": 4, "seed": 7}


async def chunks(sup: Supervisor, **fields: Any) -> list[CompletionChunk]:
    async with sup.completion("flux", **{**ORDER, **fields}) as completion:
        return [chunk async for chunk in completion]


async def picture(sup: Supervisor, **fields: Any) -> Image.Image:
    return opened((await chunks(sup, **fields))[-1])


def opened(chunk: CompletionChunk) -> Image.Image:
    with Image.open(io.BytesIO(chunk.image_bytes())) as found:
        return found.convert("RGB")


def saved(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
async def flux(tiny: Path) -> AsyncIterator[Supervisor]:
    async with supervisor(tiny) as sup:
        yield sup


@BOTH_LOOPS
async def test_steps_previews_and_a_picture_that_its_seed_brings_back(flux: Supervisor) -> None:
    *steps, last = await chunks(flux, previews=2)
    assert [chunk.step for chunk in steps if not chunk.preview] == [0, 1, 2, 3, 4]
    assert {chunk.total for chunk in steps} == {4}
    assert [chunk.step for chunk in steps if chunk.preview] == [1, 3]
    assert all(opened(chunk).size == (64, 64) for chunk in steps if chunk.preview)
    assert (last.done, last.seed, last.eval_count) == (True, 7, 4)
    first = opened(last)
    assert first.size == (64, 64)
    assert len(first.getcolors(64 * 64) or ()) > 100, "nothing is in the picture"
    assert (await picture(flux)).tobytes() == first.tobytes()
    assert (await picture(flux, seed=8)).tobytes() != first.tobytes()
    assert (await picture(flux, prompt="a blue heart")).tobytes() != first.tobytes()


async def test_a_caller_who_leaves_between_two_steps_frees_the_runner(flux: Supervisor) -> None:
    async with flux.completion("flux", **{**ORDER, "steps": 200}) as completion:
        async for chunk in completion:
            if chunk.step == 2:
                break
    pid = report(flux, "flux").pid
    await chunks(flux, steps=1)
    assert report(flux, "flux").pid == pid, "it was started anew"
    assert any("given up" in line for line in flux.logs("flux"))


async def test_editing_goes_from_the_picture_itself_to_nothing_of_it(flux: Supervisor) -> None:
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    edit: dict[str, Any] = {"images": [saved(red)]}
    assert (await picture(flux, **edit, strength=0.0)).tobytes() == red.tobytes()
    *steps, last = await chunks(flux, **edit, strength=0.5)
    assert [chunk.step for chunk in steps] == [0, 2, 3, 4]
    assert last.eval_count == 2
    fresh = await picture(flux)
    assert opened(last).tobytes() != fresh.tobytes()
    assert (await picture(flux, **edit, strength=1.0)).tobytes() == fresh.tobytes()


async def test_what_a_distilled_model_cannot_honour_is_refused(flux: Supervisor) -> None:
    for field in ({"negative_prompt": "dogs"}, {"guidance": 3.0}):
        with pytest.raises(UnsupportedParameter, match=next(iter(field))):
            await chunks(flux, **field)


async def test_memory_is_estimated_measured_and_told_by_the_runner(flux: Supervisor) -> None:
    await chunks(flux)
    memory = report(flux, "flux").memory
    assert memory.estimated > 20 << 20
    with anyio.fail_after(PATIENCE):
        await until(lambda: report(flux, "flux").memory.measured > 100 << 20, PATIENCE)
    health = await _health(report(flux, "flux").address)
    assert health["memory"]["peak"] >= health["memory"]["active"] > 15 << 20


async def _health(address: str) -> dict[str, Any]:
    async with await anyio.connect_unix(address.removeprefix("unix:")) as stream:
        await stream.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        body = b"".join([part async for part in stream])
    found: dict[str, Any] = json.loads(body.partition(b"\r\n\r\n")[2])
    return found


class TestAdapted:
    """Other weights than those that are stored."""

    async def test_quantised_it_takes_less_and_makes_another_picture(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(
            "STATE_DIRECTORY", str(tmp_path)
        )  # where nothing was learnt yet that would stand for one estimate
        async with supervisor(tiny) as whole, supervisor(tiny, quantize=4) as small:
            pictures = [(await picture(sup)).tobytes() for sup in (whole, small)]
            active = [(await _health(report(sup, "flux").address))["memory"]["active"] for sup in (whole, small)]
            estimated = [report(sup, "flux").memory.estimated for sup in (whole, small)]
        assert pictures[0] != pictures[1]
        assert active[1] < active[0]
        assert estimated[1] < estimated[0]

    async def test_a_lora_changes_the_picture_as_strongly_as_asked(self, tiny: Path, lora: Path) -> None:
        pictures = []
        for keys in ({}, {"lora_paths": [str(lora)]}, {"lora_paths": [str(lora)], "lora_scales": [0.0]}):
            async with supervisor(tiny, **keys) as sup:
                pictures.append((await picture(sup)).tobytes())
        plain, whole, none = pictures
        assert whole != plain
        assert none == plain

    async def test_what_mflux_says_of_a_lora_that_does_not_fit_is_told(self, tiny: Path) -> None:
        other = tiny / "vae/0.safetensors"
        async with supervisor(tiny, lora_paths=[str(other)]) as sup:
            with pytest.raises(LoadFailed, match=r"the model cannot be loaded: No LoRA layers were applied from 0"):
                await chunks(sup)


class TestFaults:
    async def test_another_pipeline_is_told_in_one_line(self, tiny: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny, other)
        index = json.loads((other / "model_index.json").read_text())
        (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
        async with supervisor(other) as sup:
            with pytest.raises(LoadFailed) as caught:
                await chunks(sup)
        assert "model_index.json is a StableDiffusionXLPipeline; known are FluxPipeline, " in caught.value.message
        assert "\n" not in caught.value.message

    async def test_a_tokenizer_that_is_missing_is_noticed_before_the_first_picture(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny, other)
        for file in (other / "tokenizer").iterdir():
            file.unlink()
        async with supervisor(other) as sup:
            with pytest.raises(
                LoadFailed, match="the model cannot be loaded: the tokenizer qwen3 is broken: "
            ) as caught:
                await chunks(sup)
        assert "\n" not in caught.value.message


class TestTheOtherPipelines:
    """Their loops, on small models put together by hand: the real ones are too large for this machine."""

    @pytest.mark.parametrize("kind", ["FLUX.1", "Z-Image", "Qwen-Image"])
    def test_steps_previews_stop_and_edit(self, kind: str) -> None:
        seen = told("tests.real.small_models", kind)
        assert seen["steps"] == [[step, 4] for step in range(5)]
        assert seen["previews"] == [[96, 64]] * 4
        assert seen["edited"] == [[2, 4], [3, 4], [4, 4]]
        assert (seen["size"], seen["mode"]) == ([96, 64], "RGB")
        assert seen["levels"] > 50
        for what in ("stopped", "reproducible", "edit differs", "last preview is the picture"):
            assert seen[what], what

    def test_what_mflux_saves_is_told_by_its_parts(self, tmp_path: Path) -> None:
        parts = told("tests.real.small_models", "parts")
        assert {kind: set(names) for kind, names in parts.items()} == _SAVED
        for kind, names in parts.items():
            blocks = [f"transformer_blocks.{number}.x" for number in range(5)] if "FLUX.2" in kind else []
            weights = dict.fromkeys([*names, *blocks], "0.safetensors")
            index = tmp_path / kind / "transformer/model.safetensors.index.json"
            index.parent.mkdir(parents=True)
            index.write_text(json.dumps({"weight_map": weights}))
            assert identify(tmp_path / kind).kind == kind
