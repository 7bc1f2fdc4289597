"""From a prompt to a picture with the small model.

Everything in here must happen in one thread: MLX arrays belong to the thread that built them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
from PIL import Image

from mlxsup.imagegen.builtin.model import EMPTY, SIDE, EmojiNet
from mlxsup.imagegen.builtin.words import Vocabulary

WEIGHTS = Path(__file__).parent / "emoji.safetensors"
"""The weights that ship; their metadata carries the vocabulary."""

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all), first with 0; may raise to stop the work between two steps."""

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
        on_step: OnStep | None = None,
    ) -> Image.Image:
        """Make one picture.

        It is sampled at 32 x 32 and then enlarged. A size that is not square gets the largest square that fits,
        centred on white, which is the background of every picture the model knows. Words it does not know are ignored,
        with a note in the log; a prompt without any known word gives some picture or other.

        Args:
            prompt: such as `a red heart`.
            width: pixels, 32 or more.
            height: pixels, 32 or more.
            steps: Euler steps from noise to picture, 1 or more.
            seed: below 2**63; the same arguments give the same picture.
            guidance: 1 follows the prompt as trained at half the cost of any other value; more pushes away from the
                prompt-less picture.
            on_step: see `OnStep`.

        Returns:
            An RGB picture of `width` x `height`.
        """
        rows, unknown = self.vocabulary.rows(prompt)
        if unknown:
            logger.info("unknown words: %s", " ".join(unknown))
        pixels = self._sample(rows, steps, seed, guidance, on_step or _nobody_asked)
        return _enlarged(Image.frombytes("RGB", (SIDE, SIDE), pixels), width, height)

    def _sample(self, rows: list[int], steps: int, seed: int, guidance: float, on_step: OnStep) -> bytes:
        """Walk from noise (time 1) to the picture (time 0); return 32 x 32 RGB bytes."""
        captions = [rows or [EMPTY]]
        if guidance != 1.0:
            captions.append([EMPTY] * len(captions[0]))
        words = mx.array(captions)
        x = mx.random.normal((1, SIDE, SIDE, 3), key=mx.random.key(seed))
        on_step(0, steps)
        for step in range(steps):
            time = mx.full((len(captions),), 1 - step / steps)
            velocity = self.net(mx.broadcast_to(x, (len(captions), *x.shape[1:])), time, words)
            if guidance != 1.0:
                velocity = velocity[1:] + guidance * (velocity[:1] - velocity[1:])
            x = x - velocity / steps
            mx.eval(x)
            on_step(step + 1, steps)
        levels = mx.round(mx.clip((x.flatten() + 1) * 127.5, 0, 255)).astype(mx.uint8)
        return bytes(cast("list[int]", levels.tolist()))


def read_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the arrays of a file, not read from the disk before they are used, and its metadata."""
    return cast("tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(path), return_metadata=True))


def _enlarged(picture: Image.Image, width: int, height: int) -> Image.Image:
    side = min(width, height)
    square = picture if side == SIDE else picture.resize((side, side), Image.Resampling.BICUBIC)
    if width == height:
        return square
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(square, ((width - side) // 2, (height - side) // 2))
    return canvas


def _nobody_asked(step: int, total: int) -> None:
    """Stand in for a caller who does not want to hear about steps."""
