"""The figures of the model card are measured rightly: a batch is what single pictures are, and colours have their names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from mlxsup.imagegen.builtin import evaluate
from mlxsup.imagegen.builtin.reference import Selection
from mlxsup.imagegen.builtin.sample import EmojiModel


@pytest.fixture(scope="module")
def model() -> EmojiModel:
    """The model that ships."""
    return EmojiModel.load()


def test_a_batch_makes_what_single_orders_make(model: EmojiModel) -> None:
    prompts, seeds = ["red heart", "fox", "four-leaf-clover"], [3, 4, 5]
    batch = evaluate.sample(model, prompts, seeds, steps=2)
    side = batch[0].width
    for prompt, seed, picture in zip(prompts, seeds, batch, strict=True):
        alone = model.generate(prompt, width=side, height=side, steps=2, seed=seed)
        pairs = zip(alone.tobytes(), picture.tobytes(), strict=True)
        assert max(abs(one - other) for one, other in pairs) <= 2  # rounding


@pytest.mark.parametrize(
    ("pixel", "name"),
    [
        ((248, 49, 47), "red"),
        ((255, 130, 45), "orange"),
        ((252, 213, 63), "yellow"),
        ((68, 145, 27), "green"),
        ((0, 116, 186), "blue"),
        ((141, 101, 197), "purple"),
        ((255, 130, 180), "pink"),
        ((109, 69, 52), "brown"),
        ((28, 28, 28), "black"),
        ((155, 155, 155), "grey"),
    ],
)
def test_colours_have_their_names(pixel: tuple[int, int, int], name: str) -> None:
    assert evaluate.colour_name(pixel) == name


def test_the_main_colour_is_that_of_most_of_the_foreground() -> None:
    picture = Image.new("RGB", (10, 10), "white")
    assert evaluate.main_colour(picture) == "white"
    picture.paste((0, 116, 186), (0, 0, 4, 4))
    picture.paste((248, 49, 47), (5, 5, 8, 8))
    assert evaluate.main_colour(picture) == "blue"


def test_unseen_pairs_were_not_learnt_and_their_things_were() -> None:
    selection = Selection.load()
    assert len(selection.kept_out) == 12
    for colour, name in selection.kept_out:
        assert f"{colour}-{name}" not in selection.names
        assert colour in selection.tints
        assert any(known.split("-")[-1] == name for known in selection.names)


def test_the_sheet_is_drawn_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sheet.png"
    monkeypatch.setattr(evaluate, "SHOWN", ("red heart", "blue apple"))
    monkeypatch.setattr(evaluate, "COLUMNS", 1)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--sheet", str(file)])
    evaluate.main()
    with Image.open(file) as sheet:
        assert (sheet.width, sheet.height) == (evaluate.CELL + 2 * evaluate.GAP, 2 * evaluate.CELL + 3 * evaluate.GAP)
        heart, apple = (
            sheet.crop((0, at, sheet.width, at + evaluate.CELL)) for at in (0, evaluate.CELL + evaluate.GAP)
        )
        assert (evaluate.main_colour(heart), evaluate.main_colour(apple)) == ("red", "blue")
