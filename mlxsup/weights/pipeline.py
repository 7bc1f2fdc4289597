"""Folders: pipelines that make pictures, of components in folders of their own, and which kind of folder one is.

A diffusers pipeline names its components in `model_index.json`; what else lies in its folder (the same weights in one file,
other formats) is not loaded and not counted. Folders of components without that file, as mflux saves them, count whole.
"""

from __future__ import annotations

from typing import Any, Final

from mlxsup.weights import gguf, safetensors
from mlxsup.weights.model import Part, Weights, combine
from mlxsup.weights.reading import Folder, Path, brief, json_file, listing, unreadable

INDEX: Final = "model_index.json"

_COMPONENTS_LIMIT: Final = 100
_WEIGHTLESS: Final = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor")
"""How the classes of components end that have no weights."""


def measure_folder(path: Path) -> Weights:
    """Measure a folder, whichever kind it is: pipeline, safetensors with or without index, GGUF.

    Raises:
        UnreadableModel: it holds no weights, or something in it cannot be read.
    """
    folder = listing(path)
    if INDEX in folder.files:
        return combine(path, "pipeline", _named_components(folder))
    if safetensors.is_in(folder):
        return safetensors.measure_folder(folder)
    if folder.ending(gguf.SUFFIX):
        return _gguf_folder(folder)
    parts = [part for component in folder.folders[:_COMPONENTS_LIMIT] for part in _component(folder, component)]
    if not parts:
        raise unreadable(path, f"holds no {safetensors.SUFFIX} and no {gguf.SUFFIX} files{_what_else(folder)}")
    return combine(path, "pipeline", parts)


def _named_components(folder: Folder) -> list[Part]:
    index = folder.inside(INDEX)
    parts = []
    for name, kind in json_file(index, dict[str, Any]).items():
        if name.startswith("_") or not _is_component(kind):
            continue
        if not name or "/" in name or "\0" in name or name == "..":
            raise unreadable(index, f"names the component {brief(name)!r}, which is no folder in its own")
        found = _component(folder, name) if name in folder.folders else []
        if not found and not kind[1].endswith(_WEIGHTLESS):
            there = f"no {safetensors.SUFFIX} in it" if name in folder.folders else "not there"
            raise unreadable(folder.inside(name), f"{there}, but {INDEX} names it: {brief(kind[1])}", missing=True)
        parts += found
    if not parts:
        raise unreadable(index, "names no component that has weights")
    return parts


def _is_component(kind: object) -> bool:
    """Tell a component, `["diffusers", "AutoencoderKL"]`, from one that is left out, `[null, null]`, and from a setting."""
    return isinstance(kind, list) and len(kind) == 2 and isinstance(kind[1], str) and kind[0] is not None


def _component(folder: Folder, name: str) -> list[Part]:
    below = listing(folder.inside(name))
    return safetensors.read_folder(below) if safetensors.is_in(below) else []


def _gguf_folder(folder: Folder) -> Weights:
    """Measure the one model of a folder; a projector (`mmproj` in its name) beside it is loaded with it."""
    names = folder.ending(gguf.SUFFIX)
    projectors = [name for name in names if "mmproj" in name.lower()]
    models = [name for name in names if name not in projectors and gguf.stands_for_its_set(name, names)]
    if len(models) != 1 or len(projectors) > 1:
        several = ", ".join(map(brief, (models + projectors)[:5]))
        raise unreadable(folder.path, f"not one GGUF model; name the file: {several}")
    parts = [part for name in (*models, *projectors) for part in gguf.read_set(folder.inside(name))]
    return combine(folder.path, "gguf", parts)


def _what_else(folder: Folder) -> str:
    for suffix, words in ((".bin", "PyTorch's .bin"), (".pth", "PyTorch's .pth"), (".npz", "NumPy's .npz")):
        if folder.ending(suffix):
            return f"; {words} files are not read"
    return ""
