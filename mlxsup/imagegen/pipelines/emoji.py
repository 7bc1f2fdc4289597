"""The small model that ships, as a pipeline of the runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxsup.imagegen.builtin.model import SIDE
from mlxsup.imagegen.builtin.sample import EmojiModel
from mlxsup.imagegen.pipelines.base import OnStep, Order, Progress, Sizes

if TYPE_CHECKING:
    from PIL import Image


class EmojiPipeline:
    """`builtin:emoji`: sampled as a small square, enlarged to the size asked for.

    Args:
        progress: told that the code is imported (a half) and that the weights are read (1).
    """

    sizes = Sizes(smallest=SIDE, multiple=8, default=256, keep_shape=False)
    default_steps = 8
    default_guidance = 1.0
    honours = frozenset({"guidance", "images", "strength", "previews"})
    most_images = 1

    def __init__(self, progress: Progress) -> None:
        progress(0.5)
        self._model = EmojiModel.load()
        progress(1.0)

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        """Make the picture; see `EmojiModel.generate`."""
        return self._model.generate(
            order.prompt,
            width=order.width,
            height=order.height,
            steps=order.steps,
            seed=order.seed,
            guidance=order.guidance,
            picture=order.images[0] if order.images else None,
            strength=order.strength,
            on_step=on_step,
        )
