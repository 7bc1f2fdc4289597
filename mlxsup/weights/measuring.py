"""The one entry: how large is the model of this path or name."""

from __future__ import annotations

import os
from typing import Final

from mlxsup.weights import gguf, ollama_store, pipeline, safetensors, snapshot
from mlxsup.weights.model import Weights
from mlxsup.weights.reading import Path, exists, is_folder, listing, opened, readable, unreadable

_PATH_MARKS: Final = ("/", "./", "../", "~")


def measure(path_or_name: Path, *, ollama_store: Path | None = None, hf_cache: Path | None = None) -> Weights:
    """Measure a model from the headers of its files; it may block for as long as the disk takes, so call it off the loop.

    What exists as a path is that path: a .safetensors or .gguf file, a folder of them, a pipeline's folder, a repository or a
    snapshot of a Hugging Face cache, an Ollama manifest. Else it is a name, looked up in the stores that are given.

    Args:
        path_or_name: a path (`~` is filled in), `llama3.2:latest`, `HOST/NAMESPACE/MODEL:TAG`, or `ORG/NAME@REVISION`.
        ollama_store: the folder that has `manifests` and `blobs`.
        hf_cache: the folder that has `models--ORG--NAME`.

    Raises:
        UnreadableModel: there is no such model, there are two of that name, or a file of it is not what it claims to be.
    """
    path = os.path.expanduser(os.fspath(path_or_name))  # noqa: PTH111 - never raises
    if exists(path):
        return _measure_path(path, ollama_store)
    name = os.fspath(path_or_name)
    if name.startswith(_PATH_MARKS) or name.endswith((gguf.SUFFIX, safetensors.SUFFIX)):
        raise unreadable(path, "no such file or folder", missing=True)
    return _measure_name(name, ollama_store, hf_cache)


def _measure_path(path: str, store: Path | None) -> Weights:
    if is_folder(path):
        folder = listing(path)
        return pipeline.measure_folder(snapshot.revision_of(path) if snapshot.is_repository(folder) else path)
    with opened(path) as file:
        start = file.at(0, min(file.size, 16))
    if start[:4] == gguf.MAGIC or path.endswith(gguf.SUFFIX):
        return gguf.measure_file(path)
    if path.endswith(safetensors.SUFFIX) or start[8:9] == b"{":
        return safetensors.measure_file(path)
    if store is not None and start.lstrip()[:1] == b"{" and _is_below(path, store):
        return ollama_store.measure(path, store)
    raise unreadable(path, "neither safetensors nor GGUF")


def _measure_name(name: str, store: Path | None, cache: Path | None) -> Weights:
    manifest = ollama_store.find(name, store) if store is not None else None
    folder = snapshot.find(name, cache) if cache is not None else None
    if manifest is not None and folder is not None:
        raise unreadable(
            name, f"both {readable(manifest)} and {readable(folder)}; give the path of the one that is meant"
        )
    if manifest is not None and store is not None:
        return ollama_store.measure(manifest, store)
    if folder is not None:
        return pipeline.measure_folder(folder)
    places = [
        f"a model of {what} {readable(place)}"
        for what, place in (("the Ollama store", store), ("the cache", cache))
        if place
    ]
    raise unreadable(
        name,
        f"neither {' nor '.join(['a file or folder', *places])}" if places else "no such file or folder",
        missing=True,
    )


def _is_below(path: str, folder: Path) -> bool:
    return os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)  # noqa: PTH100 - links into the store stay
