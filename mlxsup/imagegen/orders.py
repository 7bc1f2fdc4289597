"""From the body of `POST /completion` to an order that the pipeline can carry out, or a clear no."""

from __future__ import annotations

import math

import msgspec

from mlxsup.errors import InvalidRequest, UnsupportedParameter
from mlxsup.imagegen.pipelines.base import MOST_STEPS, Order, Pipeline
from mlxsup.protocol import CompletionRequest

STRONGEST_GUIDANCE = 30.0
_COMMON = frozenset({"width", "height", "steps", "seed"})
_decoder = msgspec.json.Decoder(CompletionRequest)


def read_order(body: bytes, pipeline: Pipeline) -> Order:
    """Read one request; what it leaves open gets the pipeline's defaults, and a seed is chosen.

    Raises:
        InvalidRequest: not JSON, an unknown key, a wrong type, or a value out of range.
        UnsupportedParameter: a known field that this pipeline can do nothing with.
    """
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request cannot be read: {error}") from error
    for field in request.fields_in_use():
        if field not in _COMMON and field not in pipeline.honours:
            raise UnsupportedParameter(f"this model can do nothing with {field}; leave it out")
    request = request.with_seed()
    assert request.seed is not None
    return Order(
        prompt=request.prompt,
        width=_side("width", request.width, pipeline),
        height=_side("height", request.height, pipeline),
        steps=_steps(request.steps, pipeline),
        seed=request.seed,
        guidance=_guidance(request.guidance, pipeline),
    )


def _side(name: str, side: int | None, pipeline: Pipeline) -> int:
    if side is None:
        return pipeline.sizes.default
    complaint = pipeline.sizes.complaint(name, side)
    if complaint:
        raise InvalidRequest(complaint)
    return side


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
