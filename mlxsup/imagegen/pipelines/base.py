"""What the runner wants of an image model. A pipeline is loaded and used in one thread only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[float], None]
"""Told how much of the loading is done, 0 to 1."""

Preview = Callable[[], "Image.Image"]
"""Makes an RGB picture of the work as it stands, as cheaply as it can be had; good until `on_step` returns.

Its size is the pipeline's choice: it is shrunk to `PREVIEW_SIDE` before it is sent, and may be smaller.
"""

LARGEST_SIDE = 4096
MOST_STEPS = 200
PREVIEW_SIDE = 512
"""Pixels of a preview's longer side, at most."""


class OnStep(Protocol):
    """What a pipeline calls before its first step and after each one."""

    def __call__(self, step: int, total: int, preview: Preview | None = None, /) -> None:
        """Take note of a step; may raise to stop the work, which the pipeline lets pass.

        Args:
            step: steps done. The first call may have more than 0: a picture that is edited is past its first steps.
            total: steps in all, which is the order's number.
            preview: called at those steps of which somebody wants to see a picture, and at no other.
        """


@dataclass(frozen=True)
class Sizes:
    """The sizes of picture a pipeline makes; all in pixels, alike for width and height.

    Attributes:
        smallest: the pipeline's own size.
        multiple: every side is a multiple of this.
        default: a side that is not asked for.
        largest: the limit.
        keep_shape: whether an edited picture whose size is not asked for keeps the shape of the one that came in.
    """

    smallest: int
    multiple: int
    default: int
    largest: int = LARGEST_SIDE
    keep_shape: bool = True

    def complaint(self, name: str, side: int) -> str | None:
        """Say in one sentence what is wrong with `side`, called `name` on the wire; None if it is fine."""
        if not self.smallest <= side <= self.largest:
            return f"{name} must be from {self.smallest} to {self.largest} pixels, not {side}"
        below = side - side % self.multiple
        if below != side:
            return f"{name} must be a multiple of {self.multiple}: {below} or {below + self.multiple}, not {side}"
        return None

    def within(self, pixels: int) -> Sizes:
        """Return the same sizes, with a default whose square has no more than `pixels`, if there is one so small."""
        side = math.isqrt(pixels)
        return self if self.default <= side else replace(self, default=self.nearest(side - side % self.multiple))

    def nearest(self, side: float) -> int:
        """Return the side that can be made and is nearest to this one."""
        low, high = -(-self.smallest // self.multiple), self.largest // self.multiple
        return min(max(round(side / self.multiple), low), high) * self.multiple


@dataclass(frozen=True)
class Order:
    """One picture to make, checked and with every default filled in.

    Attributes:
        prompt: what to show.
        width: pixels.
        height: pixels.
        steps: sampling steps, 1 to `MOST_STEPS`.
        seed: 0 < seed < 2**53; the same order gives the same picture.
        guidance: how strongly to follow the prompt.
        negative_prompt: what not to show.
        images: the pictures to start from, upright RGB on white, in their own shape; `inputs.fitted` brings them to
            another one. No side is longer than the longer one of the picture to make.
        strength: how far the result may go from `images`: at 0 it is the picture that came in, at 1 nothing is left of
            it. 1 without images, and for a pipeline that does not honour it.
    """

    prompt: str
    width: int
    height: int
    steps: int
    seed: int
    guidance: float
    negative_prompt: str = ""
    images: tuple[Image.Image, ...] = ()
    strength: float = 1.0


class Pipeline(Protocol):
    """A loaded image model.

    Attributes:
        sizes: the pictures it makes.
        default_steps: steps when none are asked for.
        default_guidance: guidance when none is asked for.
        honours: the fields of a request that it can do something with, of `negative_prompt`, `guidance`, `images`,
            `strength` and `previews`; the others are the runner's business.
        most_images: how many pictures it takes at once; of no meaning unless it honours `images`.
    """

    sizes: Sizes
    default_steps: int
    default_guidance: float
    honours: frozenset[str]
    most_images: int

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        """Make one RGB picture of the ordered size; lets pass whatever `on_step` raises."""
        ...


Loader = Callable[[Progress], Pipeline]
"""Loads one pipeline; call it in the thread that will use it.

Raises ImportError without MLX or Pillow, OSError or ValueError for broken weights.
"""
