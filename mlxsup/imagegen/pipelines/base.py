"""What the runner wants of an image model. A pipeline is loaded and used in one thread only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[float], None]
"""Told how much of the loading is done, 0 to 1."""

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all), first with 0; may raise to stop the work between two steps."""

LARGEST_SIDE = 4096
MOST_STEPS = 200


@dataclass(frozen=True)
class Sizes:
    """The sizes of picture a pipeline makes; all in pixels, alike for width and height.

    Attributes:
        smallest: the pipeline's own size.
        multiple: every side is a multiple of this.
        default: a side that is not asked for.
        largest: the limit.
    """

    smallest: int
    multiple: int
    default: int
    largest: int = LARGEST_SIDE

    def complaint(self, name: str, side: int) -> str | None:
        """Say in one sentence what is wrong with `side`, called `name` on the wire; None if it is fine."""
        if not self.smallest <= side <= self.largest:
            return f"{name} must be from {self.smallest} to {self.largest} pixels, not {side}"
        below = side - side % self.multiple
        if below != side:
            return f"{name} must be a multiple of {self.multiple}: {below} or {below + self.multiple}, not {side}"
        return None


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
    """

    prompt: str
    width: int
    height: int
    steps: int
    seed: int
    guidance: float


class Pipeline(Protocol):
    """A loaded image model.

    Attributes:
        sizes: the pictures it makes.
        default_steps: steps when none are asked for.
        default_guidance: guidance when none is asked for.
        honours: the fields of a request, beside prompt, size, steps and seed, that it can do something with.
    """

    sizes: Sizes
    default_steps: int
    default_guidance: float
    honours: frozenset[str]

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        """Make one RGB picture of the ordered size; lets pass whatever `on_step` raises."""
        ...


Loader = Callable[[Progress], Pipeline]
"""Loads one pipeline; call it in the thread that will use it.

Raises ImportError without MLX or Pillow, OSError or ValueError for broken weights.
"""
