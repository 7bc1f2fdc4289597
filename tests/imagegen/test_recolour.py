"""Drawings in other colours: what changes, what stays, and what has no colour to change."""

from __future__ import annotations

import io

import pytest
import resvg_py
from PIL import Image

from mlxsup.imagegen.builtin.evaluate import main_colour
from mlxsup.imagegen.builtin.recolour import base_name, recoloured
from mlxsup.imagegen.builtin.reference import Selection

TINTS = Selection.load().tints
APPLE = (
    '<circle cx="16" cy="18" r="11" fill="#F8312F"/><path fill="#CA0B4A" d="M16 18h11a11 11 0 0 1-11 11z"/>'
    '<path fill="#44911B" d="M14 1h6v7h-6z"/><circle cx="12" cy="16" r="1" fill="#000"/>'
)
ROCK = '<path fill="#9B9B9B" d="M4 10h24v18H4z"/><path fill="#BEBEBE" d="M4 10h24v6H4z"/><path fill="#212121" d="M8 20h4v4H8z"/>'
FLAG = "".join(
    f'<path fill="{fill}" d="M0 {8 * at}h32v8H0z"/>' for at, fill in enumerate(("#f00", "#0a0", "#00f", "#ff0"))
)


def _drawn(body: str) -> Image.Image:
    svg = f'<svg viewBox="0 0 32 32">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("body", [APPLE, ROCK])
@pytest.mark.parametrize("colour", sorted(TINTS))
def test_what_was_recoloured_has_the_colour_of_that_name(body: str, colour: str) -> None:
    made = recoloured(body, _drawn(body), TINTS[colour])
    assert made is not None
    assert main_colour(_drawn(made)) == colour


def test_only_the_main_colour_changes_and_its_shades_stay_apart() -> None:
    made = recoloured(APPLE, _drawn(APPLE), TINTS["blue"])
    assert made is not None
    assert "#44911B" in made
    assert '"#000"' in made
    light, dark = (_drawn(made).getpixel(at) for at in ((20, 36), (40, 48)))
    assert isinstance(light, tuple)
    assert isinstance(dark, tuple)
    assert light[2] > dark[2] > dark[0]


def test_the_dark_parts_of_what_is_grey_stay_dark() -> None:
    made = recoloured(ROCK, _drawn(ROCK), TINTS["yellow"])
    assert made is not None
    assert "#212121" in made


def test_what_has_many_colours_is_left_alone() -> None:
    assert recoloured(FLAG, _drawn(FLAG), TINTS["blue"]) is None
    assert recoloured('<path fill="#fff" d="M0 0h9v9z"/>', _drawn(""), TINTS["blue"]) is None


@pytest.mark.parametrize(
    ("name", "base"),
    [("red-apple", "apple"), ("white-flower", "flower"), ("redwood", "redwood"), ("red", "red"), ("apple", "apple")],
)
def test_a_name_loses_the_colour_it_begins_with(name: str, base: str) -> None:
    assert base_name(name, TINTS) == base
