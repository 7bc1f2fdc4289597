"""Makes pictures with a loaded model of mflux: its loop, with steps, previews and a stop between two of them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxsup.imagegen.inputs import fitted
from mlxsup.imagegen.pipelines.base import PREVIEW_SIDE, OnStep, Order, Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

MOST_PROMPTS = 4
"""Prompts of earlier pictures whose encodings are kept; mflux itself would keep them all."""

_EVERY_MODEL = frozenset({"images", "strength", "previews"})


@dataclass(frozen=True)
class Traits:
    """What tells one model of a pipeline from another.

    Attributes:
        steps: when none are asked for.
        guidance: when none is asked for.
        honours: which of `guidance` and `negative_prompt` it can do something with.
    """

    steps: int
    guidance: float
    honours: frozenset[str] = frozenset()


class MfluxPipeline:
    """A model of mflux as the runner wants it.

    Args:
        model: an object of one of mflux's classes, such as `Flux1`.
        latents: the class of mflux that unpacks this model's latents.
        traits: of this model.
    """

    sizes = Sizes(smallest=64, multiple=16, default=1024)
    most_images = 1

    def __init__(self, model: Any, latents: Any, traits: Traits) -> None:
        self.default_steps = traits.steps
        self.default_guidance = traits.guidance
        self.honours = traits.honours | _EVERY_MODEL
        self._model = model
        self._steps = _Steps(model, latents)
        model.callbacks.register(self._steps)

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        """Make the picture; what `on_step` raises passes through mflux's loop, which only catches KeyboardInterrupt.

        With a picture to start from the first steps are left out: at strength 0 all of them, at 1 none, else as many as
        come nearest to `1 - strength`, but one is always made.
        """
        start = fitted(order.images[0], order.width, order.height) if order.images else None
        skipped = _skipped(order.steps, order.strength) if start is not None else 0
        if start is not None and skipped == order.steps:
            on_step(order.steps, order.steps)
            return start
        choices: dict[str, Any] = {}
        if skipped:
            # mflux wants the share of steps to leave out, and cuts it down to whole ones.
            choices |= {"image_path": start, "image_strength": (skipped + 0.5) / order.steps}
        if "negative_prompt" in self.honours:
            choices["negative_prompt"] = order.negative_prompt or None
        _forget_prompts(getattr(self._model, "prompt_cache", {}))
        with self._steps.told_to(on_step):
            made = self._model.generate_image(
                seed=order.seed,
                prompt=order.prompt or " ",  # no token at all is more than mflux can take
                num_inference_steps=order.steps,
                width=order.width,
                height=order.height,
                guidance=order.guidance,
                **choices,
            )
        return made.image


class _Steps:
    """Callbacks of mflux's loop, by the names it looks for."""

    def __init__(self, model: Any, latents: Any) -> None:
        self._model = model
        self._latents = latents
        self._on_step: OnStep | None = None
        self._before: mx.array | None = None

    @contextmanager
    def told_to(self, on_step: OnStep) -> Iterator[None]:
        """Pass the steps of one picture on."""
        self._on_step = on_step
        try:
            yield
        finally:
            self._on_step = self._before = None

    def call_before_loop(self, *, latents: mx.array, config: Any, **_: object) -> None:
        """Note where the work begins."""
        assert self._on_step is not None
        self._before = latents
        self._on_step(config.init_time_step, config.num_inference_steps)

    def call_in_loop(self, *, t: int, latents: mx.array, config: Any, **_: object) -> None:
        """Tell of the step that takes `before` to `latents`."""
        assert self._on_step is not None
        assert self._before is not None
        mx.eval(latents)  # mflux does it after this call, so that the step would be told before it is made
        before, self._before = self._before, latents
        self._on_step(t + 1, config.num_inference_steps, lambda: self._preview(before, latents, t, config))

    def _preview(self, before: mx.array, after: mx.array, t: int, config: Any) -> Image.Image:
        """Return what the picture would be if the step at hand went on to the end: noise goes down in a straight line."""
        from mflux.models.common.vae.vae_util import VAEUtil
        from mflux.utils.image_util import ImageUtil

        noise, left = config.scheduler.sigmas[t], config.scheduler.sigmas[t + 1]
        packed = (before + (after - before) * (noise / (noise - left))).astype(after.dtype)
        plain = self._latents.unpack_latents(latents=packed, height=config.height, width=config.width)
        if hasattr(self._model.vae, "unpack_packed_latents"):  # FLUX.2: four pixels of latents in one, normalised
            plain = self._model.vae.unpack_packed_latents(plain)
        small = _pooled(plain, -(-max(config.width, config.height) // PREVIEW_SIDE))
        return ImageUtil.to_pil(
            VAEUtil.decode(vae=self._model.vae, latent=small, tiling_config=self._model.tiling_config)
        )


def _skipped(steps: int, strength: float) -> int:
    if strength <= 0:
        return steps
    if strength >= 1:
        return 0
    return min(max(1, round(steps * (1 - strength))), steps - 1)


def _pooled(latent: mx.array, factor: int) -> mx.array:
    """Shrink latents [batch, channels, height, width] by averaging, since decoding is what costs."""
    if factor <= 1:
        return latent
    batch, channels, height, width = latent.shape
    rows, columns = height // factor, width // factor
    whole = latent[:, :, : rows * factor, : columns * factor]
    return whole.reshape(batch, channels, rows, factor, columns, factor).mean(axis=(3, 5))


def _forget_prompts(cache: dict[Any, Any]) -> None:
    while len(cache) > MOST_PROMPTS:
        del cache[next(iter(cache))]
