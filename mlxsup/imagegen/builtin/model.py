"""The network: a small U-Net that says in which direction a noisy 64 x 64 picture has to move.

It is trained with rectified flow: between a picture (time 0) and Gaussian noise (time 1) lies a straight line, and the
network predicts the line's direction, `noise - picture`, from a point on it, the time, and the words of the caption.
"""

from __future__ import annotations

import math

import mlx.core as mx
from mlx import nn

from mlxsup.imagegen.builtin.conv import conv3x3

SIDE = 64
"""Side of a picture in pixels."""

FOLD = 4
"""Pixels of a side that are folded into channels before anything else is done."""

SKETCH = 16
"""Channels of the rough plan at a quarter of the inner resolution that is read off the words alone."""

TIME_SHIFT = 3.0
"""Times are drawn, and steps are taken, more densely near the noise: `t -> s t / (1 + (s - 1) t)` of evenly spaced ones.

There the caption alone decides what becomes of it; the larger a picture, the more noise it takes to hide its outlines
(Esser and others, Scaling Rectified Flow Transformers, 2024, section 5.3.2).
"""

EMPTY = 0
"""Row of the word table that stands for "no caption", and fills up short ones."""


class EmojiNet(nn.Module):
    """Predict the velocity of a noisy picture.

    Args:
        words: how many words the vocabulary has; the word table has one row more, for `EMPTY`.
        fine: channels at 16 x 16.
        coarse: channels at 8 x 8, and of the words' meaning.
        depth: residual blocks at 8 x 8.
    """

    def __init__(self, words: int, *, fine: int = 64, coarse: int = 160, depth: int = 4) -> None:
        super().__init__()
        context = coarse
        self.words = nn.Embedding(words + 1, context)
        self.words.weight = mx.random.normal((words + 1, context))
        self.time = nn.Linear(context, context)
        self.caption = nn.Linear(context, context)
        self.context = nn.Linear(context, context)
        inner = SIDE // FOLD
        self.enter = Conv3x3(3 * FOLD**2, fine)
        self.place_fine = mx.zeros((inner, inner, fine))
        self.place_coarse = mx.zeros((inner // 2, inner // 2, coarse))
        self.plan = nn.Linear(context, (inner // 2) ** 2 * SKETCH)
        self.follow = nn.Linear(SKETCH, coarse, bias=False)
        self.going_down = [Block(fine, context) for _ in range(2)]
        self.down = nn.Linear(4 * fine, coarse)
        self.middle = [Block(coarse, context) for _ in range(depth)]
        self.attention = Attention(coarse)
        self.up = nn.Linear(coarse, fine)
        self.join = nn.Linear(2 * fine, fine)
        self.going_up = [Block(fine, context) for _ in range(2)]
        self.leave = Conv3x3(fine, 3 * FOLD**2, scale=0.0)

    def __call__(self, x: mx.array, time: mx.array, words: mx.array) -> mx.array:
        """Predict `noise - picture`.

        Args:
            x: noisy pictures, shape (n, 64, 64, 3), pictures being in -1..1.
            time: where on the line each stands, shape (n,), 0 (picture) to 1 (noise).
            words: rows of the word table, shape (n, any), filled up with `EMPTY`.

        Returns:
            Shape (n, 64, 64, 3).
        """
        context = self._context(time, words)
        h = self.enter(_unshuffled(x, FOLD)) + self.place_fine
        for block in self.going_down:
            h = block(h, context)
        skip = h
        h = self.down(_unshuffled(h, 2)) + self.place_coarse
        plan = self.plan(context).reshape(*h.shape[:3], SKETCH)
        h = h + self.follow(plan)
        for index, block in enumerate(self.middle):
            h = block(h, context)
            if index == (len(self.middle) - 1) // 2:
                h = self.attention(h)
        h = _repeated(self.up(h))
        h = self.join(mx.concatenate([h, skip], axis=-1))
        for block in self.going_up:
            h = block(h, context)
        return _shuffled(self.leave(_hardswish(_normed(h))), FOLD)

    def _context(self, time: mx.array, words: mx.array) -> mx.array:
        known = (words != EMPTY).astype(mx.float32)
        # A caption without words is the row EMPTY itself: the mean is then over that row alone.
        weight = mx.where(known.sum(axis=1, keepdims=True) > 0, known, mx.ones_like(known))
        weight = weight / weight.sum(axis=1, keepdims=True)
        meaning = (self.words(words) * weight[..., None]).sum(axis=1)
        wave = _waves(time, self.time.weight.shape[-1])
        context: mx.array = _hardswish(self.context(_hardswish(self.time(wave) + self.caption(meaning))))
        return context


class Block(nn.Module):
    """Residual block whose inside is scaled and shifted by the context (FiLM)."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.first = Conv3x3(channels, channels)
        self.second = Conv3x3(channels, channels, scale=0.0)
        self.film = nn.Linear(context, 2 * channels)

    def __call__(self, x: mx.array, context: mx.array) -> mx.array:
        """Keep the shape (n, height, width, channels); `context` has shape (n, context)."""
        scale, shift = mx.split(self.film(context)[:, None, None, :], 2, axis=-1)
        h = self.first(_hardswish(_normed(x)))
        h = self.second(_hardswish(_normed(h) * (1 + scale) + shift))
        return x + h


class Attention(nn.Module):
    """Every pixel looks at every other one; only worth it where there are few."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(channels, 3 * channels, bias=False)
        self.answer = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        """Keep the shape (n, height, width, channels)."""
        count, height, width, channels = x.shape
        asked = self.ask(_normed(x)).reshape(count, height * width, 3, self.heads, channels // self.heads)
        query, key, value = (asked[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        seen = mx.fast.scaled_dot_product_attention(query, key, value, scale=(channels // self.heads) ** -0.5)
        return x + self.answer(seen.transpose(0, 2, 1, 3).reshape(x.shape))


class Conv3x3(nn.Module):
    """A 3 x 3 convolution with bias; `scale` 0 makes it start as zero, so that a block starts as the identity."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = mx.random.normal((outputs, 3, 3, inputs)) * (scale / math.sqrt(9 * inputs))
        self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        """Map (n, height, width, inputs) to (n, height, width, outputs)."""
        return conv3x3(x, self.weight) + self.bias


def _normed(x: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, None, None, 1e-5)


def _hardswish(x: mx.array) -> mx.array:
    """Do as `mlx.nn.hardswish`, which is compiled: on the CPU that calls a C++ compiler."""
    return x * mx.clip(x / 6 + 0.5, 0, 1)


def _unshuffled(x: mx.array, fold: int) -> mx.array:
    """Fold squares of pixels into channels: a downsampling whose gradient is a reshape."""
    n, h, w, c = x.shape
    squares = x.reshape(n, h // fold, fold, w // fold, fold, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(n, h // fold, w // fold, fold**2 * c)


def _shuffled(x: mx.array, fold: int) -> mx.array:
    n, h, w, c = x.shape
    squares = x.reshape(n, h, w, fold, fold, c // fold**2).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(n, fold * h, fold * w, c // fold**2)


def _repeated(x: mx.array) -> mx.array:
    n, h, w, c = x.shape
    return mx.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def times(steps: int) -> list[float]:
    """Return the `steps + 1` times of a walk from noise (1) to picture (0), closest together where most was trained.

    No steps are no walk: just the end.
    """
    even = [1 - step / steps for step in range(steps + 1)] if steps else [0.0]
    return [TIME_SHIFT * time / (1 + (TIME_SHIFT - 1) * time) for time in even]


def _waves(time: mx.array, size: int) -> mx.array:
    rates = mx.exp(mx.arange(size // 2) * (math.log(1000.0) / (size // 2 - 1)))
    angles = time[:, None] * rates[None, :]
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
