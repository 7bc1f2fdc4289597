"""What the runner wants of an image model, and which one a model's name means.

A pipeline is loaded and used in one thread only. Nothing here imports MLX, so that a wrong name is told at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[float], None]
"""Told how much of the loading is done, 0 to 1."""

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all), first with 0; may raise to stop the work between two steps."""

LARGEST_SIDE = 4096
MOST_STEPS = 200
BUILTIN = "builtin:"


class NoSuchModelError(Exception):
    """The name given as `--model` is nothing that can be loaded; the message is one line."""


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


def resolve(model: str) -> Loader:
    """Find out what a model's name means, without loading anything.

    Args:
        model: `builtin:emoji`, or the path of a model.

    Raises:
        NoSuchModelError: it is neither.
    """
    if model == f"{BUILTIN}emoji":
        return _load_emoji
    if model.startswith(BUILTIN):
        raise NoSuchModelError(f"no built-in model is called {model!r}; there is {BUILTIN}emoji")
    path = Path(model).expanduser()
    if not path.exists():
        raise NoSuchModelError(f"no model at {path}: there is no such file or folder")
    raise NoSuchModelError(f"no model at {path}: this is nothing that the image runner can load")


def load_pipeline(model: str, progress: Progress) -> Pipeline:
    """Load a model; the thread that calls this is the one that has to use it.

    Raises:
        NoSuchModelError: the name means no model.
        ImportError: MLX or Pillow is missing.
        OSError: the weights cannot be read.
        ValueError: the weights are not those of the model.
    """
    return resolve(model)(progress)


def _load_emoji(progress: Progress) -> Pipeline:
    from mlxsup.imagegen.pipelines.emoji import EmojiPipeline  # imports MLX

    return EmojiPipeline(progress)
