"""What of mflux's pipelines can be told without mflux: a stand-in keeps to the contract of its classes and callbacks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

from mlxsup.imagegen.pipelines.base import Order
from mlxsup.imagegen.pipelines.mflux.folders import Base
from mlxsup.imagegen.pipelines.mflux.pipeline import MOST_PROMPTS, MfluxPipeline, Traits, _pooled
from tests.imagegen.conftest import PATIENCE
from tests.imagegen.test_service import PanicException

RED = Image.new("RGB", (64, 32), "red")


class StandIn:
    """Goes through its steps as mflux's classes do: callbacks before the loop and in it, share of steps left out."""

    def __init__(self) -> None:
        self.callbacks = self
        self.prompt_cache: dict[str, bytes] = {}
        self.asked: list[dict[str, Any]] = []

    def register(self, callback: Any) -> None:
        self.callback = callback

    def generate_image(self, **asked: Any) -> Any:
        self.asked.append(asked)
        self.prompt_cache[asked["prompt"]] = b"encoded"
        steps, strength = asked["num_inference_steps"], asked.get("image_strength") or 0.0
        first = max(1, int(steps * strength)) if strength > 0 else 0
        config = SimpleNamespace(init_time_step=first, num_inference_steps=steps, scheduler=None)
        latents = mx.zeros((1, 4))
        named = {"seed": asked["seed"], "prompt": asked["prompt"], "config": config}
        self.callback.call_before_loop(latents=latents, canny_image=None, **named)
        for t in range(first, steps):
            latents = latents + 1
            self.callback.call_in_loop(t=t, latents=latents, time_steps=None, **named)
        return SimpleNamespace(image=Image.new("RGB", (asked["width"], asked["height"])))


def made(pipeline: MfluxPipeline, **fields: Any) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Make a picture; return it and the steps that were told."""
    seen: list[tuple[int, int]] = []
    order = Order(**{"prompt": "p", "width": 64, "height": 64, "steps": 4, "seed": 1, "guidance": 2.0, **fields})
    return pipeline.generate(order, lambda step, total, *_: seen.append((step, total))), seen


@pytest.fixture
def model() -> StandIn:
    return StandIn()


@pytest.fixture
def pipeline(model: StandIn) -> MfluxPipeline:
    return MfluxPipeline(model, None, Traits(steps=4, guidance=1.0, honours=frozenset({"guidance"})))


def test_every_step_is_told_and_the_order_reaches_mflux(model: StandIn, pipeline: MfluxPipeline) -> None:
    picture, seen = made(pipeline, width=96, height=48, seed=2**52)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert picture.size == (96, 48)
    assert model.asked == [
        {
            "prompt": "p",
            "seed": 2**52,
            "num_inference_steps": 4,
            "width": 96,
            "height": 48,
            "guidance": 2.0,
        }
    ]


def test_what_on_step_raises_comes_through_and_the_next_picture_is_made(pipeline: MfluxPipeline) -> None:
    class GoneError(Exception):
        pass

    def leave(step: int, _total: int, *_: object) -> None:
        if step == 2:
            raise GoneError

    with pytest.raises(GoneError):
        pipeline.generate(Order("p", 64, 64, 4, 1, 1.0), leave)
    assert made(pipeline)[1][-1] == (4, 4)


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [
        *[(4, 0.5, 2), (4, 0.75, 1), (10, 0.7, 3), (10, 0.8, 2), (5, 0.4, 3), (20, 0.85, 3)],
        *[(4, 0.95, 1), (4, 0.01, 3), (1, 0.5, 0), (50, 0.02, 49), (4, 1.0, 0)],
    ],
)
def test_the_less_strength_the_more_steps_are_left_out(
    model: StandIn, pipeline: MfluxPipeline, steps: int, strength: float, first: int
) -> None:
    _, seen = made(pipeline, steps=steps, strength=strength, images=(RED,))
    assert seen == [(step, steps) for step in range(first, steps + 1)]
    start = model.asked[0].get("image_path")
    assert (start is None) == (first == 0)
    if start is not None:
        assert (start.size, start.getpixel((32, 32)), start.getpixel((32, 2))) == ((64, 64), (255, 0, 0), (255,) * 3)


def test_without_any_strength_the_picture_comes_back(model: StandIn, pipeline: MfluxPipeline) -> None:
    picture, seen = made(pipeline, strength=0.0, images=(RED,), height=32)
    assert picture.tobytes() == RED.tobytes()
    assert seen == [(4, 4)]
    assert model.asked == []


def test_an_empty_prompt_is_a_space(model: StandIn, pipeline: MfluxPipeline) -> None:
    made(pipeline, prompt="")
    assert model.asked[0]["prompt"] == " "


@pytest.mark.parametrize(("given", "passed"), [("dogs", "dogs"), ("", None)])
def test_a_negative_prompt_is_passed_on_where_it_is_honoured(model: StandIn, given: str, passed: str | None) -> None:
    able = MfluxPipeline(model, None, Traits(steps=4, guidance=1.0, honours=frozenset({"negative_prompt"})))
    made(able, negative_prompt=given)
    assert model.asked[0]["negative_prompt"] == passed


def test_encoded_prompts_do_not_add_up(model: StandIn, pipeline: MfluxPipeline) -> None:
    for number in range(3 * MOST_PROMPTS):
        made(pipeline, prompt=f"prompt {number}")
    assert len(model.prompt_cache) <= MOST_PROMPTS + 1
    assert f"prompt {3 * MOST_PROMPTS - 1}" in model.prompt_cache


def test_sides_are_multiples_of_16(pipeline: MfluxPipeline) -> None:
    assert pipeline.sizes.complaint("width", 1024) is None
    assert "1008 or 1024" in (pipeline.sizes.complaint("width", 1020) or "")
    assert pipeline.sizes.default == 1024


def test_latents_shrink_by_averages_and_what_is_left_over_goes() -> None:
    latents = mx.arange(1 * 2 * 4 * 6).reshape(1, 2, 4, 6).astype(mx.float32)
    small = _pooled(latents, 2)
    assert small.shape == (1, 2, 2, 3)
    assert small[0, 0, 0, 0].item() == (0 + 1 + 6 + 7) / 4
    assert _pooled(latents, 4).shape == (1, 2, 1, 1)
    assert _pooled(latents, 1) is latents


def test_each_model_has_its_traits() -> None:
    from typing import get_args

    from mlxsup.imagegen.pipelines.mflux.loading import TRAITS

    assert set(TRAITS) == set(get_args(Base))
    assert {base for base, traits in TRAITS.items() if "negative_prompt" in traits.honours} == {"z-image", "qwen-image"}


def test_a_tokenizer_that_panics_is_named() -> None:
    """A panic of the Rust within is no Exception."""
    from mlxsup.imagegen.pipelines.mflux.loading import _try_tokenizers

    def panic(_: str) -> None:
        raise PanicException("no vocabulary")

    with pytest.raises(ValueError, match=r"^the tokenizer t5 is broken: no vocabulary$"):
        _try_tokenizers(SimpleNamespace(tokenizers={"t5": SimpleNamespace(tokenize=panic)}))


def test_without_mflux_the_runner_says_so_with_its_mend(tmp_path: Path) -> None:
    if importlib.util.find_spec("mflux"):
        pytest.skip("it is there")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    command = [sys.executable, "-m", "mlxsup.imagegen", "--imagegen-engine", "--model", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "mlxsup runner: the model cannot be loaded: mflux is not importable: No module named 'mflux'; "
        "mend: pip install 'mlxsup[mflux]'",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "7"], "no quantisation to 7 bits; there is 3, 4, 5, 6, 8"),
        (["--lora", "/nowhere/lora"], "no LoRA at /nowhere/lora: there is no such file"),
        (["--lora", __file__, "--lora-scale", "1", "--lora-scale", "2"], "1 LoRAs and 2 scales"),
    ],
)
def test_arguments_that_make_no_sense_are_told(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    command = [sys.executable, "-m", "mlxsup.imagegen", "--imagegen-engine", "--model", str(tmp_path), "--port", "0"]
    done = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"mlxsup runner: {words}")
