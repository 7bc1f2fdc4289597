"""The same drawing in another colour: what teaches the model that `blue` means something wherever it stands.

Only the fills that belong to a drawing's main colour change, and they keep their differences of lightness; a leaf on an
apple stays green. Nothing here needs MLX.
"""

from __future__ import annotations

import colorsys
import re
from collections import Counter
from collections.abc import Mapping

from PIL import Image

Tint = tuple[float, float, float]
"""Hue in degrees, lightness and saturation from 0 to 1, of a colour that has a name."""

NEAR_HUE = 50.0
"""Degrees on the circle of hues within which fills belong together."""
GREYISH = 0.2
"""Fills less saturated than this have no hue worth the name."""
INK = 0.15
"""Greyish fills darker than this are eyes and outlines, and stay as they are."""
CONTRAST = 0.6
"""How much of a drawing's differences of lightness the new colour keeps."""
SHARE = 0.4
"""A drawing has a main colour when fills of this share of its area belong together."""
SAME_FILL = 6
"""A pixel belongs to a fill when no channel differs by more levels than this."""

_FILL = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")
_WHITE = (255, 255, 255)
_Rgb = tuple[int, int, int]


def recoloured(body: str, drawn: Image.Image, tint: Tint) -> str | None:
    """Return the SVG body with its main colour replaced; None if it has no main colour.

    Args:
        body: what lies within `<svg>`.
        drawn: the same, drawn on white.
        tint: the new main colour.
    """
    fills = {text: _rgb(text) for text in _FILL.findall(body)}
    areas = _areas(drawn, set(fills.values()))
    if not areas:
        return None
    main, _ = areas.most_common(1)[0]
    family = {fill for fill in set(fills.values()) if _belongs(fill, main)}
    if sum(areas[fill] for fill in family) < SHARE * areas.total():
        return None
    return _FILL.sub(
        lambda found: _tinted(fills[found[0]], main, tint) if fills[found[0]] in family else found[0], body
    )


def base_name(name: str, colours: Mapping[str, Tint]) -> str:
    """Return a picture's name without the colour it begins with: `red-apple` is an `apple`."""
    first, _, rest = name.partition("-")
    return rest if first in {*colours, "white"} and rest else name


def _rgb(text: str) -> _Rgb:
    digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def _areas(drawn: Image.Image, fills: set[_Rgb]) -> Counter[_Rgb]:
    """Count the pixels of each fill; white ones lie on white paper and tell nothing."""
    areas: Counter[_Rgb] = Counter()
    for count, pixel in drawn.getcolors(drawn.width * drawn.height) or ():
        assert isinstance(pixel, tuple)
        for fill in fills - {_WHITE}:
            if max(abs(one - other) for one, other in zip(pixel, fill, strict=True)) <= SAME_FILL:
                areas[fill] += count
                break
    return areas


def _hls(fill: _Rgb) -> tuple[float, float, float]:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(level / 255 for level in fill))
    return hue * 360, lightness, saturation


def _belongs(fill: _Rgb, main: _Rgb) -> bool:
    hue, lightness, saturation = _hls(fill)
    main_hue, _, main_saturation = _hls(main)
    if main_saturation < GREYISH:
        return saturation < GREYISH and lightness > INK
    apart = abs(hue - main_hue)
    return saturation >= GREYISH and min(apart, 360 - apart) <= NEAR_HUE


def _tinted(fill: _Rgb, main: _Rgb, tint: Tint) -> str:
    hue, lightness, saturation = tint
    lighter = CONTRAST * (_hls(fill)[1] - _hls(main)[1])
    levels = colorsys.hls_to_rgb(hue / 360, min(0.95, max(0.05, lightness + lighter)), saturation)
    return "#" + "".join(f"{round(255 * level):02x}" for level in levels)
