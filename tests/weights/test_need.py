"""What a model needs: declared, learnt, or added up."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsup.weights import Margin, Need, Weights, image_working_set, measure, need, text_working_set

from .making import safetensors, write

MIB = 1024**2


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return measure(write(tmp_path / "m.safetensors", safetensors({"w": ("F32", [1000])})))


def test_what_is_declared_wins_over_what_is_learnt_and_that_over_an_estimate(weights: Weights) -> None:
    assert need(weights, declared=12, learnt=13) == Need(total=12, source="declared", tensors=4000)
    estimate = need(weights).total
    assert need(weights, learnt=13) == Need(total=13, source="learnt", tensors=4000, estimate=estimate)
    assert need(None, declared=0) == Need(total=0, source="declared")
    with pytest.raises(ValueError, match="declared or learnt"):
        need(None)


def test_an_estimate_is_tensors_working_set_and_margin(weights: Weights) -> None:
    found = need(weights, working_set=500, margin=Margin(share=0.1, floor=100))

    assert found == Need(total=4000 + 500 + 400, source="estimated", tensors=4000, working_set=500, margin=400)
    assert need(weights).margin == 256 * MIB


def test_working_sets_grow_with_the_picture_or_with_the_model(weights: Weights) -> None:
    assert image_working_set(1024, 1024) == 9.5 * 1024 * MIB
    assert image_working_set(2048, 1024) == 2 * image_working_set(1024, 1024)
    assert image_working_set(10, 10, bytes_per_pixel=7) == 700
    assert text_working_set(weights) == 800
