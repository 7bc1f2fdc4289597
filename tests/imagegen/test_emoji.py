"""The small model itself: its words, its arithmetic, and whether it knows its pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest
from PIL import Image, ImageChops, ImageStat

from mlxsup.imagegen.builtin import sample
from mlxsup.imagegen.builtin.conv import _taps
from mlxsup.imagegen.builtin.model import SIDE
from mlxsup.imagegen.builtin.reference import ATLAS, HERE, Selection, read_atlas
from mlxsup.imagegen.builtin.sample import WEIGHTS, EmojiModel
from mlxsup.imagegen.builtin.words import Vocabulary, split
from mlxsup.imagegen.pipelines.base import Preview


@pytest.fixture(scope="module")
def model() -> EmojiModel:
    return EmojiModel.load()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red heart", ["red", "heart"]),
        ("The  RED, heart!", ["red", "heart"]),
        ("heart-on-fire", ["heart", "fire"]),
        ("t-shirt", ["t", "shirt"]),
        ("", []),
        ("of the\n\x00", []),
    ],
)
def test_a_prompt_becomes_its_meaningful_words(text: str, words: list[str]) -> None:
    assert split(text) == words


def test_words_are_looked_up_in_any_number_and_once() -> None:
    vocabulary = Vocabulary(["cat", "cherries", "heart", "hearts"])
    assert vocabulary.rows("cats") == ([1], [])
    assert vocabulary.rows("heart hearts heart") == ([3, 4], [])
    assert vocabulary.rows("a cherry") == ([2], [])
    assert vocabulary.rows("dog cat dog") == ([1], ["dog", "dog"])


def test_no_two_pictures_have_the_same_caption() -> None:
    names = Selection.load().names
    assert len({frozenset(split(name)) for name in names}) == len(names)


def test_the_weights_belong_to_the_pictures_and_are_small(model: EmojiModel) -> None:
    assert model.vocabulary.words == Vocabulary.of([*Selection.load().names, *Selection.load().tints]).words
    assert WEIGHTS.stat().st_size <= 8 << 20
    assert len(read_atlas(Selection.load())) == len(Selection.load().names)
    for name in (ATLAS.name, "MODEL_CARD.md", "LICENSE.fluent-emoji"):
        assert (HERE / name).is_file()


def test_the_quick_convolution_is_the_convolution() -> None:
    def quick(x: mx.array, weight: mx.array) -> mx.array:
        return mx.sin(cast("mx.array", _taps(x, weight))).sum()

    def plain(x: mx.array, weight: mx.array) -> mx.array:
        return mx.sin(mx.conv2d(x, weight, padding=1)).sum()

    x = mx.random.normal((3, 6, 4, 5), key=mx.random.key(1))
    weight = mx.random.normal((7, 3, 3, 5), key=mx.random.key(2))
    for ours, theirs in zip(
        (quick(x, weight), *mx.grad(quick, argnums=(0, 1))(x, weight)),
        (plain(x, weight), *mx.grad(plain, argnums=(0, 1))(x, weight)),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_steps_are_told_from_zero_and_may_stop_the_work(model: EmojiModel) -> None:
    told: list[tuple[int, int]] = []

    def on_step(step: int, total: int, preview: Preview | None = None, /) -> None:
        told.append((step, total))
        if step == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        model.generate("sun", width=SIDE, height=SIDE, steps=4, seed=1, on_step=on_step)
    assert told == [(0, 4), (1, 4), (2, 4)]


def test_unknown_words_are_logged(model: EmojiModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=sample.__name__):
        model.generate("a red xyzzy heart plugh", width=SIDE, height=SIDE, steps=1, seed=1)
    assert caplog.messages == ["unknown words: xyzzy plugh"]


@pytest.mark.parametrize("prompt", ["xyzzy " * 100_000, "x" * 100_000], ids=["many words", "a long word"])
def test_a_line_of_unknown_words_ends(model: EmojiModel, caplog: pytest.LogCaptureFixture, prompt: str) -> None:
    with caplog.at_level(logging.INFO, logger=sample.__name__):
        model.generate(prompt, width=SIDE, height=SIDE, steps=1, seed=1)
    (line,) = caplog.messages
    assert line.startswith(f"unknown words: {prompt[:100]}")
    assert line.endswith("...")
    assert len(line) < 300


def test_missing_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"emoji\.safetensors"):
        EmojiModel.load(tmp_path)


NAMES = ["red-heart", "blue-heart", "green-circle", "purple-square", "rainbow", "watermelon", "sunflower", "pizza"]


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_its_pictures(model: EmojiModel, name: str) -> None:
    """A sample is nearer to the picture of its own name than to any other."""
    selection = Selection.load()
    atlas = dict(zip(selection.names, read_atlas(selection), strict=True))
    made = model.generate(name.replace("-", " "), width=SIDE, height=SIDE, steps=8, seed=1)
    distances = {other: _distance(made, picture) for other, picture in atlas.items()}
    assert min(distances, key=lambda other: distances[other]) == name


def _distance(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).sum2)
