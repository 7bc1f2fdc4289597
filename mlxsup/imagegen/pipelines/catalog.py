"""Which pipeline a model's name means. Nothing here imports MLX, so that a wrong name is told at once."""

from __future__ import annotations

from pathlib import Path

from mlxsup.imagegen.pipelines.base import Loader, Pipeline, Progress

BUILTIN = "builtin:"


class NoSuchModelError(Exception):
    """The name given as `--model` is nothing that can be loaded; the message is one line."""


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


def _load_emoji(progress: Progress) -> Pipeline:
    from mlxsup.imagegen.pipelines.emoji import EmojiPipeline  # imports MLX

    return EmojiPipeline(progress)
