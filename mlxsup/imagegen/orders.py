"""From the body of `POST /completion` to an order that the pipeline can carry out, or a clear no.

It decodes the pictures that come along, so it is not for the event loop.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from mlxsup.errors import InvalidRequest, UnsupportedParameter
from mlxsup.imagegen.encoding import DEFAULT_QUALITY, Output
from mlxsup.imagegen.inputs import read_picture
from mlxsup.imagegen.pipelines.base import MOST_STEPS, Order, Pipeline, Sizes
from mlxsup.metadata import Settings
from mlxsup.protocol import CompletionRequest

if TYPE_CHECKING:
    from PIL import Image

STRONGEST_GUIDANCE = 30.0
DEFAULT_STRENGTH = 0.6
_BY_THE_RUNNER = frozenset({"width", "height", "steps", "seed", "output_format", "output_compression", "metadata"})
_decoder = msgspec.json.Decoder(CompletionRequest)


def read_order(body: bytes | bytearray, pipeline: Pipeline, max_pixels: int | None = None) -> tuple[Order, Output]:
    """Read one request; what it leaves open gets the pipeline's defaults, and a seed is chosen.

    Without a size, an edited picture keeps the shape it came in, if the pipeline can make such shapes.

    Args:
        body: JSON.
        pipeline: which is to carry it out.
        max_pixels: width x height that memory is reserved for; None where only the pipeline's own bounds hold. A side that
            nobody asks for is as small as that needs.

    Raises:
        InvalidRequest: not JSON, an unknown key, a wrong type, a value out of range, a picture that cannot be read, or one to
            make that has more than `max_pixels`.
        UnsupportedParameter: a known field that this pipeline can do nothing with.
    """
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request cannot be read: {error}") from error
    for field in request.fields_in_use():
        if (
            field not in _BY_THE_RUNNER
            and field not in pipeline.honours
            and (field, request.previews) != ("previews", 0)
        ):
            raise UnsupportedParameter(f"this model can do nothing with {field}; leave it out")
    request = request.with_seed()
    assert request.seed is not None
    steps, guidance = _steps(request.steps, pipeline), _guidance(request.guidance, pipeline)
    for name, side in (("width", request.width), ("height", request.height)):
        if side is not None and (complaint := pipeline.sizes.complaint(name, side)):
            raise InvalidRequest(complaint)
    request.check()
    output = _output(request)
    sizes = pipeline.sizes if max_pixels is None else pipeline.sizes.within(max_pixels)
    images = _images(request, pipeline.most_images, sizes)
    width, height = _size(request, sizes, images)
    if max_pixels is not None and width * height > max_pixels:
        told = f"{width} x {height} is more than the {max_pixels} pixels that memory is reserved for; the key is max_pixels"
        raise InvalidRequest(told, details={"param": "height" if request.width is None else "width"})
    order = Order(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        seed=request.seed,
        guidance=guidance,
        images=images,
        strength=_strength(request, pipeline),
    )
    return order, output


def settings_of(order: Order, pipeline: Pipeline, model: str) -> Settings:
    """Return what a picture file says of an order, as far as it had a meaning for this pipeline."""
    edits = order.images and "strength" in pipeline.honours
    return Settings(
        prompt=order.prompt,
        negative_prompt=order.negative_prompt,
        seed=order.seed,
        steps=order.steps,
        guidance=order.guidance if "guidance" in pipeline.honours else None,
        strength=order.strength if edits else None,
        width=order.width,
        height=order.height,
        model=model,
    )


def _steps(steps: int | None, pipeline: Pipeline) -> int:
    if steps is None:
        return pipeline.default_steps
    if not 1 <= steps <= MOST_STEPS:
        raise InvalidRequest(f"steps must be from 1 to {MOST_STEPS}, not {steps}")
    return steps


def _guidance(guidance: float | None, pipeline: Pipeline) -> float:
    if guidance is None:
        return pipeline.default_guidance
    if not (math.isfinite(guidance) and 0 <= guidance <= STRONGEST_GUIDANCE):
        raise InvalidRequest(f"guidance must be from 0 to {STRONGEST_GUIDANCE:g}, not {guidance:g}")
    return guidance


def _output(request: CompletionRequest) -> Output:
    kind, compression = request.output_format or "png", request.output_compression
    if compression is not None and kind == "png":
        raise InvalidRequest(
            "output_compression is the quality of webp and jpeg, and png loses nothing: leave it out, or set output_format",
            details={"param": "output_compression"},
        )
    return Output(
        format=kind,
        quality=DEFAULT_QUALITY if compression is None else compression,
        metadata=request.metadata is not False,
        previews=request.previews or 0,
    )


def _images(request: CompletionRequest, most: int, sizes: Sizes) -> tuple[Image.Image, ...]:
    if len(request.images) > most:
        pictures = "one picture" if most == 1 else f"{most} pictures"
        told = f"images: this model takes {pictures} at once, not {len(request.images)}"
        raise InvalidRequest(told, details={"param": "images"})
    longest = max(request.width or sizes.default, request.height or sizes.default)
    return tuple(read_picture(data, f"images[{index}]", longest) for index, data in enumerate(request.images))


def _size(request: CompletionRequest, sizes: Sizes, images: tuple[Image.Image, ...]) -> tuple[int, int]:
    width, height = request.width, request.height
    if not (images and sizes.keep_shape) or (width and height):
        return width or sizes.default, height or sizes.default
    shape = images[0].width / images[0].height
    if width:
        return width, sizes.nearest(width / shape)
    if height:
        return sizes.nearest(height * shape), height
    return sizes.nearest(sizes.default * min(1, shape)), sizes.nearest(sizes.default / max(1, shape))


def _strength(request: CompletionRequest, pipeline: Pipeline) -> float:
    if not request.images:
        if request.strength is not None:
            told = "strength says how far the result may go from images, and there are none"
            raise InvalidRequest(told, details={"param": "strength"})
        return 1.0
    if "strength" not in pipeline.honours:
        return 1.0
    return DEFAULT_STRENGTH if request.strength is None else request.strength
