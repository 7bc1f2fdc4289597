"""Measure the shipped model: `python -m mlxsup.imagegen.builtin.evaluate [--sheet FILE]`.

Prints, at several numbers of steps, how often a sample of a name the model knows is nearest to that name's own picture
among all pictures it knows (root mean square over pixels), how often an unseen pair of a colour and a thing gets the
right colour, and how long a picture takes. `--sheet` draws a contact sheet of samples instead.
"""

from __future__ import annotations

import argparse
import colorsys
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from PIL import Image

from mlxsup.imagegen.builtin.model import EMPTY, SIDE, times
from mlxsup.imagegen.builtin.reference import Selection, read_atlas
from mlxsup.imagegen.builtin.sample import EmojiModel, picture_of

SEEDS = (1, 2, 3, 4)
STEPS = (4, 8)
BATCH = 64
NEAR = 5
TIMED = 20
PAPER = 24
"""A pixel is foreground when a channel is further than this from white."""

SHOWN = (
    *("red heart", "fox", "strawberry", "rocket", "octopus", "umbrella", "hamburger", "sunflower", "guitar", "penguin"),
    *("blue apple", "green dog", "purple automobile", "red elephant", "orange whale", "purple horse", "pink key"),
    *("red frog", "yellow umbrella", "blue bell"),
)
"""What the contact sheet shows: ten names, and ten pairs that were kept out of training."""
COLUMNS = 10
GAP = 8
CELL = 96
SHEET_STEPS = 8


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m mlxsup.imagegen.builtin.evaluate", description=__doc__)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw a contact sheet, and measure nothing")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="folder of other weights than those that ship")
    arguments = parser.parse_args()
    mx.disable_compile()
    began = time.monotonic()
    model = EmojiModel.load(arguments.weights) if arguments.weights else EmojiModel.load()
    loaded = time.monotonic() - began
    if arguments.sheet:
        sheet(model).save(arguments.sheet, optimize=True)
        print(f"wrote {arguments.sheet}")
        return
    selection = Selection.load()
    for steps in STEPS:
        first, near = recall(model, selection, steps)
        print(
            f"{steps} steps: {len(selection.names)} names, {len(SEEDS)} seeds each: nearest is its own {first:.1%}, "
            f"among the nearest {NEAR} {near:.1%}",
            flush=True,
        )
        right, wrong = composition(model, selection, steps)
        print(
            f"{steps} steps: {len(selection.kept_out)} unseen pairs, {len(SEEDS)} seeds each: colour right {right:.1%}"
            + (f"; wrong: {', '.join(wrong)}" if wrong else ""),
            flush=True,
        )
    pace = [seconds_a_picture(model, seed) for seed in range(TIMED)]
    print(
        f"loaded in {loaded:.2f} s; a picture of 8 steps in {statistics.median(pace):.3f} s (median of {TIMED}), "
        f"worst {max(pace):.3f} s; MLX at most {mx.get_peak_memory() / (1 << 20):.0f} MiB"
    )


def recall(model: EmojiModel, selection: Selection, steps: int) -> tuple[float, float]:
    """Return the shares of samples whose own picture is the nearest, and among the nearest `NEAR`."""
    pictures = read_atlas(selection)
    known = mx.stack([mx.array(list(picture.tobytes())) for picture in pictures]).astype(mx.float32)
    wanted = [(index, seed) for index in range(len(selection.names)) for seed in SEEDS]
    names = [selection.names[index] for index, _ in wanted]
    ranks: list[int] = []
    samples = sample(model, names, [seed for _, seed in wanted], steps)
    for (index, _), made in zip(wanted, samples, strict=True):
        pixels = mx.array(list(made.tobytes())).astype(mx.float32)
        far = (known - pixels).square().sum(axis=1)
        ranks.append(int((far < far[index]).sum()))
    return sum(rank == 0 for rank in ranks) / len(ranks), sum(rank < NEAR for rank in ranks) / len(ranks)


def composition(model: EmojiModel, selection: Selection, steps: int) -> tuple[float, list[str]]:
    """Return the share of samples of unseen pairs with the right colour, and what came out where it was wrong."""
    wanted = [(colour, name, seed) for colour, name in selection.kept_out for seed in SEEDS]
    made = sample(model, [f"{colour} {name}" for colour, name, _ in wanted], [seed for *_, seed in wanted], steps)
    found = [main_colour(picture) for picture in made]
    wrong = [
        f"{colour} {name} {seed}: {got}"
        for (colour, name, seed), got in zip(wanted, found, strict=True)
        if got != colour
    ]
    return 1 - len(wrong) / len(wanted), wrong


def sample(model: EmojiModel, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Image.Image]:
    """Make many pictures, `BATCH` at a time; each is what `EmojiModel.generate` makes of the same prompt and seed."""
    made: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        rows = [model.vocabulary.rows(prompt)[0] or [EMPTY] for prompt in prompts[start : start + BATCH]]
        longest = max(map(len, rows))
        words = mx.array([row + [EMPTY] * (longest - len(row)) for row in rows])
        noises = [mx.random.normal((SIDE, SIDE, 3), key=mx.random.key(seed)) for seed in seeds[start : start + BATCH]]
        x = mx.stack(noises)
        for now, then in pairwise(times(steps)):
            x = x - model.net(x, mx.full((len(rows),), now), words) * (now - then)
            mx.eval(x)
        made += [picture_of(one) for one in x]
    return made


def main_colour(picture: Image.Image) -> str:
    """Name the colour that most of a picture's foreground has."""
    names: Counter[str] = Counter()
    for count, pixel in picture.getcolors(picture.width * picture.height) or ():
        assert isinstance(pixel, tuple)
        if max(255 - level for level in pixel) > PAPER:
            names[colour_name(pixel)] += count
    return names.most_common(1)[0][0] if names else "white"


def colour_name(pixel: tuple[int, ...]) -> str:
    """Name a colour, by its hue on the circle and, where that is shared, by its lightness."""
    red, green, blue = (level / 255 for level in pixel)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if lightness < 0.12 or (saturation < 0.15 and lightness < 0.35):
        return "black"
    if saturation < 0.15:
        return "grey"
    degrees = hue * 360
    if degrees >= 345 or degrees < 12:
        return "pink" if lightness > 0.68 else "red"
    if degrees < 40:
        return "brown" if lightness < 0.42 and saturation < 0.75 else "orange"
    for limit, name in ((68, "yellow"), (170, "green"), (245, "blue"), (300, "purple")):
        if degrees < limit:
            return name
    return "pink"


def seconds_a_picture(model: EmojiModel, seed: int) -> float:
    """Time one picture of the size and the steps that are the default."""
    began = time.perf_counter()
    model.generate("red heart", width=256, height=256, steps=8, seed=seed)
    return time.perf_counter() - began


def sheet(model: EmojiModel) -> Image.Image:
    """Draw a contact sheet of what `SHOWN` lists."""
    rows = -(-len(SHOWN) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * (CELL + GAP) + GAP), "white")
    for index, picture in enumerate(sample(model, SHOWN, SEEDS[:1] * len(SHOWN), SHEET_STEPS)):
        row, column = divmod(index, COLUMNS)
        whole.paste(
            picture.resize((CELL, CELL), Image.Resampling.BICUBIC),
            (GAP + column * (CELL + GAP), GAP + row * (CELL + GAP)),
        )
    return whole


if __name__ == "__main__":
    main()
    sys.stdout.flush()
