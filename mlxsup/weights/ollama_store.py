"""An Ollama store: a model's name leads to a manifest, the manifest to blobs by their digest.

A manifest lists layers. Weights are layers of GGUF (`model`, with `projector`, `adapter`, `draft`), or, in models that make
pictures and those for MLX, a `tensor` layer for each tensor or group of tensors: small safetensors files.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mlxsup.weights import gguf, safetensors
from mlxsup.weights.model import Format, Part, Weights, combine
from mlxsup.weights.reading import (
    FILES_LIMIT,
    Path,
    brief,
    exists,
    json_file,
    loose_json_file,
    opened,
    unreadable,
)

_FOLDERS: Final = ("manifests-v2", "manifests")
_LIST: Final = "application/vnd.ollama.manifest.list.v2+json"
_LAYER: Final = "application/vnd.ollama.image."
_MODEL_LAYERS: Final = tuple(f"{_LAYER}{kind}" for kind in ("model", "projector", "adapter", "draft"))
_TENSOR_LAYER: Final = f"{_LAYER}tensor"
_JSON_LAYER: Final = f"{_LAYER}json"

_NAME = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9][\w.-]*(?::\d+)?)/)?(?P<namespace>[A-Za-z0-9_][\w-]*)/)?"
    r"(?P<model>[A-Za-z0-9_][\w.-]*)(?::(?P<tag>[A-Za-z0-9_][\w.-]*))?",
    re.ASCII,
)
_NAME_LIMIT: Final = 350
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


class _Layer(msgspec.Struct, rename={"media_type": "mediaType"}):
    media_type: str = ""
    digest: str = ""
    size: int = 0
    name: str = ""


class _Manifest(msgspec.Struct, rename={"media_type": "mediaType"}):
    """A manifest; or one of a list of them, given whole or as the digest of a blob."""

    media_type: str = ""
    layers: list[_Layer] | None = None
    manifests: list[_Manifest] | None = None
    runner: str = ""
    digest: str = ""


def default_store(environ: Mapping[str, str] = os.environ) -> str:
    """Return where the store of this user is: $OLLAMA_MODELS, or ~/.ollama/models."""
    return os.path.expanduser(environ.get("OLLAMA_MODELS") or "~/.ollama/models")  # noqa: PTH111 - never raises


def find(name: str, store: Path) -> str | None:
    """Return the manifest of a model by its name: `llama3.2`, `library/x:tag`, `HOST/NAMESPACE/MODEL:TAG`.

    None when it is no such name, or no model of the store.

    Raises:
        UnreadableModel: the store cannot be looked into.
    """
    match = _NAME.fullmatch(name)
    if not match or len(name) > _NAME_LIMIT or ".." in name:
        return None
    below = f"{match['namespace'] or 'library'}/{match['model']}/{match['tag'] or 'latest'}"
    for folder in _FOLDERS:
        base = f"{os.fspath(store)}/{folder}"
        hosts = [match["host"]] if match["host"] else _hosts(base)
        # a link to a blob that is gone counts as none, as in Ollama
        there = [host for host in hosts if os.path.exists(f"{base}/{host}/{below}")]  # noqa: PTH110
        if len(there) > 1:
            raise unreadable(
                base, f"{name} is there from {' and from '.join(there)}: put the one that is meant before the name"
            )
        if there:
            return f"{base}/{there[0]}/{below}"
        for host in hosts:
            exists(f"{base}/{host}/{below}")  # which complains where we may not look
    return None


def _hosts(base: str) -> list[str]:
    """The hosts that models of this store came from; a name without one may be from any."""
    try:
        return sorted(os.listdir(base))  # noqa: PTH208 - names are wanted
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(base, error.strerror or str(error)) from error


def measure(manifest: Path, store: Path) -> Weights:
    """Measure the model of a manifest.

    Raises:
        UnreadableModel: the manifest or one of its blobs is no such thing, not there, or of another size.
    """
    layers = _runnable(manifest, store).layers or []
    weighty = [layer for layer in layers if layer.media_type in (*_MODEL_LAYERS, _TENSOR_LAYER)]
    if not weighty:
        raise unreadable(manifest, "lists no layer with weights")
    if len(weighty) > FILES_LIMIT:
        raise unreadable(manifest, f"lists more than {FILES_LIMIT} layers with weights")
    blobs = {_blob(manifest, store, layer): None for layer in weighty}  # each once: layers may share a blob
    parts, kinds = [], set()
    for blob in blobs:
        kind, part = _read(blob)
        parts.append(part)
        kinds.add(kind)
    kind = "gguf" if "gguf" in kinds else "pipeline" if _layer(layers, "model_index.json") else "safetensors"
    return combine(manifest, kind, parts, context_length=_context_length(manifest, store, layers))


def _runnable(manifest: Path, store: Path) -> _Manifest:
    """Read a manifest; of a list of them the one for the runner that Ollama would take on this machine."""
    found = json_file(manifest, _Manifest)
    if found.media_type != _LIST:
        return found
    choices = {choice.runner.lower(): choice for choice in reversed(found.manifests or [])}
    mac = sys.platform == "darwin" and platform.machine() == "arm64"
    for runner in ("mlx", "ollama", "llamacpp") if mac else ("ollama", "llamacpp", "mlx"):
        if runner in choices:
            choice = choices[runner]
            if choice.layers is None:
                return json_file(_blob(manifest, store, _Layer(digest=choice.digest), checked=False), _Manifest)
            return choice
    raise unreadable(manifest, f"a list without a runner that is known: {', '.join(map(brief, choices)) or 'empty'}")


def _blob(manifest: Path, store: Path, layer: _Layer, *, checked: bool = True) -> str:
    """Return the path of a layer's blob, when it is there and as long as the manifest says."""
    match = _DIGEST.fullmatch(layer.digest)
    if not match:
        raise unreadable(manifest, f"{brief(layer.digest)!r} is no digest")
    path = f"{os.fspath(store)}/blobs/sha256-{match[1].lower()}"
    if checked:
        with opened(path) as file:
            if file.size != layer.size:
                raise unreadable(path, f"{file.size} bytes, but {os.fspath(manifest)} says {layer.size}")
    return path


def _read(blob: str) -> tuple[Format, Part]:
    with opened(blob) as file:
        is_gguf = file.size >= 4 and file.at(0, 4) == gguf.MAGIC
    return ("gguf", gguf.read_file(blob)) if is_gguf else ("safetensors", safetensors.read_file(blob))


def _layer(layers: list[_Layer], name: str) -> _Layer | None:
    return next((layer for layer in layers if layer.media_type == _JSON_LAYER and layer.name == name), None)


def _context_length(manifest: Path, store: Path, layers: list[_Layer]) -> int | None:
    layer = _layer(layers, safetensors.CONFIG)
    if layer is None:
        return None
    config: dict[str, Any] = loose_json_file(_blob(manifest, store, layer))
    return safetensors.context_length(config)
