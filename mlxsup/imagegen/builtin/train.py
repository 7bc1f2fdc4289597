"""Train the small model: `python -m mlxsup.imagegen.builtin.train`.

Fetches and draws the reference pictures, trains from a fixed seed, keeps a checkpoint that a later call goes on from,
and at the end writes the weights and the atlas that ship. On Linux it restarts itself with OpenBLAS preloaded where
that is installed: the wheel's own BLAS is about fifty times slower.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxsup.imagegen.builtin.model import EmojiNet
    from mlxsup.imagegen.builtin.words import Vocabulary

BATCH = 64
STEPS = 5000
PEAK_RATE = 2e-3
WARM_UP = 100
SEED = 20
NO_CAPTION = 0.1
"""Share of samples trained without a caption, so that guidance has something to push away from."""
ONE_WORD_LESS = 0.1
"""Share of samples whose caption lacks one word, so that `heart` alone means any heart."""
RECOLOURED = 0.35
"""Share of samples whose drawing has another colour than its own, and a caption that says so."""
EMA = 0.999
CHECKPOINT_EVERY = 100


def main() -> None:
    """Parse the command line and train to the end, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser(prog="python -m mlxsup.imagegen.builtin.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="folder of downloads and checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps in all")
    parser.add_argument("--stop-at", type=int, default=0, help="stop after this step with a checkpoint, for trials")
    parser.add_argument("--no-write", action="store_true", help="leave the shipped weights and atlas alone")
    arguments = parser.parse_args()
    _with_quick_blas()
    Trainer(arguments.work, arguments.steps).run(stop_at=arguments.stop_at, write=not arguments.no_write)
    # All is on the disk; an interpreter that winds down around MLX's threads now and then aborts.
    sys.stdout.flush()
    os._exit(0)


class Trainer:
    """One run of the recipe.

    Args:
        work: folder of downloads and checkpoints; created.
        steps: length of the run; the learning rate falls to zero over it.
    """

    def __init__(self, work: Path, steps: int) -> None:
        import mlx.core as mx
        import numpy as np
        from mlx import optimizers

        from mlxsup.imagegen.builtin import reference
        from mlxsup.imagegen.builtin.model import EmojiNet
        from mlxsup.imagegen.builtin.words import Vocabulary

        self.work = work
        self.steps = steps
        self.selection = reference.Selection.load()
        self.drawn = reference.draw(reference.fetch(work), self.selection)
        self.vocabulary = Vocabulary.of([*self.selection.names, *self.selection.tints])
        self.pictures = mx.stack([mx.array(np.asarray(picture)) for picture in self.drawn.pictures])
        self.captions, self.lengths = _captions(self.vocabulary, self.drawn.captions)
        mx.random.seed(SEED)
        self.net = EmojiNet(len(self.vocabulary))
        mx.eval(self.net.parameters())
        self.average = _flat(self.net.parameters())
        self.optimizer = optimizers.AdamW(
            learning_rate=PEAK_RATE, betas=[0.9, 0.99], weight_decay=0.01, bias_correction=True
        )
        self.optimizer.init(self.net.trainable_parameters())
        self.step = 0
        self.second = ThreadPoolExecutor(1, thread_name_prefix="second-half")
        self.twin = self.second.submit(EmojiNet, len(self.vocabulary)).result()

    def run(self, *, stop_at: int, write: bool) -> None:
        """Train until the end, or until step `stop_at` if that is not 0."""
        import mlx.core as mx
        from mlx import optimizers

        self._resume()
        count = sum(value.size for value in self.average.values())
        print(
            f"{len(self.drawn.pictures)} pictures, {len(self.vocabulary)} words, {count:,} parameters, step {self.step}",
            flush=True,
        )
        losses: list[float] = []
        began = time.monotonic()
        end = min(self.steps, stop_at or self.steps)
        while self.step < end:
            loss, gradient = self._loss_and_gradient()
            gradient, _ = optimizers.clip_grad_norm(gradient, 1.0)
            self.optimizer.learning_rate = _rate(self.step, self.steps)
            self.optimizer.update(self.net, gradient)
            self.step += 1
            keep = min(EMA, self.step / (self.step + 10))
            now = _flat(self.net.parameters())
            self.average = {name: keep * value + (1 - keep) * now[name] for name, value in self.average.items()}
            mx.eval(self.net.parameters(), self.optimizer.state, self.average)
            losses.append(float(loss))
            if self.step % 25 == 0:
                pace = (time.monotonic() - began) / len(losses)
                recent = sum(losses[-25:]) / len(losses[-25:])
                print(f"step {self.step}/{self.steps} loss {recent:.4f} {pace:.3f} s a step", flush=True)
            if self.step % CHECKPOINT_EVERY == 0 or self.step == end:
                self._save()
        if self.step == self.steps and write:
            self._write()

    def _loss_and_gradient(self) -> tuple[mx.array, dict[str, Any]]:
        """Work on the two halves of a batch in two threads, because all but the matrix products runs on one core.

        An array belongs to the thread that builds it, so each thread has a network of its own and hands over only
        finished arrays.
        """
        import mlx.core as mx
        from mlx import nn
        from mlx.utils import tree_map

        def half(net: EmojiNet, batch: list[mx.array]) -> tuple[mx.array, dict[str, Any]]:
            answer: tuple[mx.array, dict[str, Any]] = nn.value_and_grad(net, _loss)(net, *batch)
            mx.eval(answer)
            return answer

        batch = self._batch()
        halves = [[array[i::2] for array in batch] for i in (0, 1)]
        mx.eval(halves)
        self.twin.update(self.net.parameters())
        other = self.second.submit(half, self.twin, halves[1])
        (loss_1, gradient_1), (loss_2, gradient_2) = half(self.net, halves[0]), other.result()
        gradient: dict[str, Any] = tree_map(lambda one, two: (one + two) / 2, gradient_1, gradient_2)
        return (loss_1 + loss_2) / 2, gradient

    def _batch(self) -> tuple[mx.array, ...]:
        """Draw a batch from a key that only depends on the step: a resumed run sees what an unbroken one would."""
        import mlx.core as mx

        from mlxsup.imagegen.builtin.model import TIME_SHIFT

        keys = mx.random.split(mx.random.key(SEED * 1_000_000 + self.step), 7)
        own, count = len(self.selection.names), len(self.drawn.pictures)
        other = mx.random.uniform(shape=(BATCH,), key=keys[6]) < RECOLOURED
        which = mx.where(
            other,
            mx.random.randint(own, count, (BATCH,), key=keys[5]),
            mx.random.randint(0, own, (BATCH,), key=keys[0]),
        )
        noise = mx.random.normal((BATCH, self.selection.side, self.selection.side, 3), key=keys[1])
        when = (mx.arange(BATCH) + mx.random.uniform(shape=(BATCH,), key=keys[2])) / BATCH
        when = TIME_SHIFT * when / (1 + (TIME_SHIFT - 1) * when)
        captions, lengths = self.captions[which], self.lengths[which]
        chance = mx.random.uniform(shape=(BATCH, 2), key=keys[3])
        left_out = mx.floor(mx.random.uniform(shape=(BATCH,), key=keys[4]) * lengths)
        shorter = (chance[:, 1] < ONE_WORD_LESS) & (lengths > 1) & ~other  # without its colour it would lie
        place = mx.arange(captions.shape[1])[None, :]
        captions = mx.where(shorter[:, None] & (place == left_out[:, None]), 0, captions)
        captions = mx.where((chance[:, 0] < NO_CAPTION)[:, None], 0, captions)
        return self.pictures[which] / 127.5 - 1, noise, when, captions

    def _checkpoint(self) -> Path:
        return self.work / "checkpoint.safetensors"

    def _save(self) -> None:
        import mlx.core as mx

        arrays = {f"net.{name}": value for name, value in _flat(self.net.parameters()).items()}
        arrays |= {f"average.{name}": value for name, value in self.average.items()}
        arrays |= {f"optimizer.{name}": value for name, value in _flat(self.optimizer.state).items()}
        unfinished = self.work / "unfinished.safetensors"
        mx.save_safetensors(str(unfinished), arrays, {"step": str(self.step), "steps": str(self.steps)})
        unfinished.replace(self._checkpoint())

    def _resume(self) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        from mlxsup.imagegen.builtin.sample import read_safetensors

        if not self._checkpoint().exists():
            return
        arrays, metadata = read_safetensors(self._checkpoint())
        if int(metadata["steps"]) != self.steps:
            sys.exit(f"{self._checkpoint()} belongs to a run of {metadata['steps']} steps; remove it to begin anew")
        parts: dict[str, list[tuple[str, mx.array]]] = {"net": [], "average": [], "optimizer": []}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part].append((rest, value))
        self.net.load_weights(parts["net"])
        self.average = dict(parts["average"])
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        mx.eval(self.net.parameters(), self.average, self.optimizer.state)
        self.step = int(metadata["step"])

    def _write(self) -> None:
        from mlxsup.imagegen.builtin import reference
        from mlxsup.imagegen.builtin.sample import WEIGHTS

        write_weights(WEIGHTS, self.average, self.vocabulary)
        reference.write_atlas(self.selection, self.drawn.pictures)
        print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size:,} bytes) and {reference.ATLAS}", flush=True)


def write_weights(path: Path, weights: dict[str, mx.array], vocabulary: Vocabulary) -> None:
    """Write weights as fp16 safetensors whose metadata carries the vocabulary."""
    import mlx.core as mx

    halves = {name: value.astype(mx.float16) for name, value in weights.items()}
    metadata = {"format": "mlx", "words": json.dumps(vocabulary.words), "licence": "MIT, see MODEL_CARD.md"}
    mx.save_safetensors(str(path), halves, metadata)


def _loss(net: EmojiNet, pictures: mx.array, noise: mx.array, when: mx.array, captions: mx.array) -> mx.array:
    at = when[:, None, None, None]
    guess = net((1 - at) * pictures + at * noise, when, captions)
    return (guess - (noise - pictures)).square().mean()


def _flat(tree: object) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return cast("dict[str, mx.array]", tree_flatten(tree, destination={}))


def _rate(step: int, steps: int) -> float:
    """Rise in a straight line for `WARM_UP` steps, then fall along a cosine to zero."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def _captions(vocabulary: Vocabulary, names: Sequence[str]) -> tuple[mx.array, mx.array]:
    import mlx.core as mx

    rows = [vocabulary.rows(name)[0] for name in names]
    longest = max(map(len, rows))
    return mx.array([row + [0] * (longest - len(row)) for row in rows]), mx.array([len(row) for row in rows])


def _with_quick_blas() -> None:
    """Start over with OpenBLAS in front of the wheel's own BLAS.

    `mx.compile` is switched off as well: for the CPU it would call a C++ compiler.
    """
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    library = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    if library and library not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        # Large buffers come and go at every operation; keep them on the heap instead of mapping and clearing them each
        # time.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 33)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program, once more


if __name__ == "__main__":
    main()
