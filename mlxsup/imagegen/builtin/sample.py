"""From a prompt to a picture with the small model.

Everything in here must happen in one thread: MLX arrays belong to the thread that built them.
"""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import cast

import mlx.core as mx
from PIL import Image

from mlxsup.imagegen.builtin.model import EMPTY, SIDE, EmojiNet, times
from mlxsup.imagegen.builtin.words import Vocabulary
from mlxsup.imagegen.inputs import fitted
from mlxsup.imagegen.pipelines.base import OnStep, Preview
from mlxsup.imagegen.previews import preview_size

WEIGHTS = Path(__file__).parent / "emoji.safetensors"
"""The weights that ship; their metadata carries the vocabulary."""

MOST_TOLD = 200
"""Characters of unknown words that a line of the log has."""

logger = logging.getLogger(__name__)


class EmojiModel:
    """A loaded model; `load` makes one.

    Args:
        net: the network, weights in place.
        vocabulary: the words it was trained with.
    """

    def __init__(self, net: EmojiNet, vocabulary: Vocabulary) -> None:
        self.net = net
        self.vocabulary = vocabulary

    @classmethod
    def load(cls, folder: Path = WEIGHTS.parent) -> EmojiModel:
        """Read `emoji.safetensors` in `folder`; the weights are half floats there and single floats in memory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the weights do not fit the network.
        """
        path = folder / WEIGHTS.name
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        arrays, metadata = read_safetensors(path)
        vocabulary = Vocabulary(json.loads(metadata["words"]))
        net = EmojiNet(len(vocabulary))
        net.load_weights([(name, value.astype(mx.float32)) for name, value in arrays.items()])
        mx.eval(net.parameters())
        return cls(net, vocabulary)

    def generate(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        steps: int,
        seed: int,
        guidance: float = 1.0,
        picture: Image.Image | None = None,
        strength: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Image.Image:
        """Make one picture.

        It is sampled at `SIDE` x `SIDE` and then enlarged. A size that is not square gets the largest square that fits,
        centred on white, which is the background of every picture the model knows. Words it does not know are ignored,
        with a note in the log; a prompt without any known word gives some picture or other.

        Args:
            prompt: such as `a red heart`.
            width: pixels, `SIDE` or more.
            height: pixels, `SIDE` or more.
            steps: Euler steps from noise to picture, 1 or more.
            seed: below 2**63; the same arguments give the same picture.
            guidance: 1 follows the prompt as trained at half the cost of any other value; more pushes away from the
                prompt-less picture.
            picture: RGB, any size, to start from; the whole of it is brought into the square.
            strength: where between `picture` (0) and noise (1) to start. That much of the steps is left to do.
            on_step: see `OnStep`; its previews are the finished picture as it can be foreseen.

        Returns:
            An RGB picture of `width` x `height`.
        """
        rows, unknown = self.vocabulary.rows(prompt)
        if unknown:
            logger.info("unknown words: %s", _brief(unknown))
        shown = preview_size(width, height)
        x = mx.random.normal((1, SIDE, SIDE, 3), key=mx.random.key(seed))
        if picture is None:
            strength = 1.0
        else:
            x = (1 - strength) * _array(picture) + strength * x
        done = steps - math.ceil(strength * steps - 1e-9)
        words = _captions(rows, guidance)
        on_step = on_step or _nobody_asked
        on_step(done, steps)
        walk = [strength * time for time in times(steps - done)]
        for step, (time, left) in enumerate(pairwise(walk), start=done):
            velocity = self._velocity(x, time, words, guidance)
            x = x - (time - left) * velocity
            mx.eval(x)
            on_step(step + 1, steps, _foreseen(x, velocity, left, shown))
        return _enlarged(picture_of(x), width, height)

    def _velocity(self, x: mx.array, time: float, words: mx.array, guidance: float) -> mx.array:
        count = words.shape[0]
        velocity: mx.array = self.net(mx.broadcast_to(x, (count, *x.shape[1:])), mx.full((count,), time), words)
        return velocity if count == 1 else velocity[1:] + guidance * (velocity[:1] - velocity[1:])


def _brief(words: list[str]) -> str:
    """Join words as far as a line has room."""
    line = " ".join(words[:MOST_TOLD])
    return line if len(line) <= MOST_TOLD else line[:MOST_TOLD] + "..."


def read_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays of a file, not read from the disk before they are used, and its metadata."""
    return cast("tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(path), return_metadata=True))


def _captions(rows: list[int], guidance: float) -> mx.array:
    """Return the rows of the word table, shape (1, any), or (2, any) with the empty caption that guidance pushes away from."""
    rows = rows or [EMPTY]
    return mx.array([rows] if guidance == 1.0 else [rows, [EMPTY] * len(rows)])


def _foreseen(x: mx.array, velocity: mx.array, time: float, size: tuple[int, int]) -> Preview:
    """Follow the line on which `x` stands at `time` to its end: less noisy than `x`, and it costs no step."""
    return lambda: _enlarged(picture_of(x - time * velocity), *size)


def _array(picture: Image.Image) -> mx.array:
    pixels = mx.array(list(fitted(picture, SIDE, SIDE).tobytes()))
    return pixels.reshape(1, SIDE, SIDE, 3).astype(mx.float32) / 127.5 - 1


def picture_of(x: mx.array) -> Image.Image:
    """Return the picture of an array of `SIDE` x `SIDE` x 3 numbers, -1 to 1, whatever its shape."""
    levels = mx.round(mx.clip((x.flatten() + 1) * 127.5, 0, 255)).astype(mx.uint8)
    return Image.frombytes("RGB", (SIDE, SIDE), bytes(cast("list[int]", levels.tolist())))


def _enlarged(picture: Image.Image, width: int, height: int) -> Image.Image:
    side = min(width, height)
    square = picture if side == SIDE else picture.resize((side, side), Image.Resampling.BICUBIC)
    if width == height:
        return square
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(square, ((width - side) // 2, (height - side) // 2))
    return canvas


def _nobody_asked(step: int, total: int, preview: Preview | None = None) -> None:
    """Stand in for a caller who does not want to hear about steps."""
