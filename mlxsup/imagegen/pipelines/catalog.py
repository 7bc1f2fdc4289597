"""Which pipeline a model's name means. Nothing here imports MLX, so that a wrong name is told at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsup.imagegen.pipelines.base import Loader, Pipeline, Progress
from mlxsup.imagegen.pipelines.selection import AS_STORED, Adaptation, NoSuchModelError

if TYPE_CHECKING:
    from mlxsup.imagegen.pipelines.mflux.folders import Found

BUILTIN = "builtin:"


def resolve(model: str, adaptation: Adaptation = AS_STORED) -> Loader:
    """Find out what a model's name means, without loading or downloading anything.

    Args:
        model: `builtin:emoji`, the folder of a pipeline, or `ORG/NAME` or `ORG/NAME@REVISION` of the Hugging Face cache.
        adaptation: how its weights are changed as they are loaded.

    Raises:
        NoSuchModelError: it is none of these, a folder that is no known pipeline, or cannot be adapted so.
    """
    if model.startswith(BUILTIN):
        return _builtin(model, adaptation)
    folder = _folder(model)
    from mlxsup.imagegen.pipelines.mflux.folders import identify

    found = identify(folder)
    adaptation.check()
    return partial(_load_mflux, found, adaptation)


def _builtin(model: str, adaptation: Adaptation) -> Loader:
    if model != f"{BUILTIN}emoji":
        raise NoSuchModelError(f"no built-in model is called {model!r}; there is {BUILTIN}emoji")
    if adaptation != AS_STORED:
        raise NoSuchModelError(f"{model} is used as it is: neither quantised nor with a LoRA")
    return _load_emoji


def _folder(model: str) -> Path:
    """Return the folder that a name means, a snapshot of the cache if it names one."""
    from mlxsup import weights

    path = Path(model).expanduser()
    try:
        if (path / "snapshots").is_dir():
            return Path(weights.snapshot.revision_of(path))
        if path.is_dir():
            return path
        cached = weights.snapshot.find(model, weights.default_cache()) if not path.exists() else None
    except (weights.UnreadableModel, OSError) as error:
        raise NoSuchModelError(f"no model at {path}: {error}") from error
    if cached is not None:
        return Path(cached)
    if path.exists():
        raise NoSuchModelError(f"no model at {path}: a file is nothing that the image runner can load; give its folder")
    cache = f", and no {model} in {weights.default_cache()}; nothing is downloaded" if model.count("/") == 1 else ""
    raise NoSuchModelError(f"no model at {path}: there is no such file or folder{cache}")


def _load_emoji(progress: Progress) -> Pipeline:
    from mlxsup.imagegen.pipelines.emoji import EmojiPipeline  # imports MLX

    return EmojiPipeline(progress)


def _load_mflux(found: Found, adaptation: Adaptation, progress: Progress) -> Pipeline:
    from mlxsup.imagegen.pipelines.mflux.loading import load  # imports MLX

    return load(found, adaptation, progress)
