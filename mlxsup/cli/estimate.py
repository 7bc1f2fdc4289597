"""`mlxsup estimate`: how large a model on disk is, and how much memory it will need."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from mlxsup import config as configuration
from mlxsup import weights
from mlxsup.cli.options import Config, Json
from mlxsup.cli.streams import json_line
from mlxsup.config import ModelSettings, rounded_size
from mlxsup.engines import ENGINES, KEYS
from mlxsup.engines.imagegen import BUILTIN
from mlxsup.errors import InvalidRequest, ModelNotFound
from mlxsup.learnt import Learnt
from mlxsup.machine import reckon
from mlxsup.statefiles import state_directory
from mlxsup.weights import Need, Weights

_SIDES = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_MOST_LINES: Final = 40
_PIXELS: Final = 1024 * 1024
_PATH_BEGINS: Final = ("/", "./", "../", "~")


class Estimate(msgspec.Struct, frozen=True):
    """What `--json` prints; `weights` is null for a model whose memory is declared and that has no path, or `unread` says why."""

    need: Need
    weights: Weights | None
    unread: str = ""


def estimate(
    model: Annotated[
        str,
        Parameter(
            help="A file or folder (safetensors, GGUF, a diffusers pipeline, a Hugging Face snapshot), or a name: in the"
            " configuration, in the Ollama store ($OLLAMA_MODELS) or in the Hugging Face cache ($HF_HUB_CACHE)."
        ),
    ],
    /,
    *,
    size: Annotated[
        str | None,
        Parameter(
            help="Of the largest picture, for models that make them: WIDTHxHEIGHT; the configuration has max_pixels."
        ),
    ] = None,
    json: Json = False,
    config: Config = None,
) -> int:
    """Tell how much memory a model will need: what the supervisor would reserve for one of the configuration, else by its files."""
    pixels = None if size is None else _pixels(size)
    if model.startswith("builtin:"):
        found = _of_configured(_shipped(model, pixels))
    elif (settings := _configured(model, config)) is not None:
        if pixels is not None:
            raise InvalidRequest(
                f"--size: {settings.name} is configured, and models.{settings.name}.max_pixels says it"
            )
        found = _of_configured(settings)
    else:
        found = _of_files(model, pixels)
    if json:
        sys.stdout.write(json_line(found))
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(model, found))
    return 0


def _pixels(size: str) -> int:
    sides = _SIDES.fullmatch(size)
    if not sides:
        raise InvalidRequest(f"--size: expected WIDTHxHEIGHT such as 1024x1024, not {size!r}")
    return int(sides[1]) * int(sides[2])


def _shipped(model: str, pixels: int | None) -> ModelSettings:
    """Configure a model that ships."""
    if model not in BUILTIN:
        raise ModelNotFound(f"no model that ships is named {model}; there is {', '.join(sorted(BUILTIN))}")
    entry = {"engine": "imagegen", "path": model} | ({"max_pixels": pixels} if pixels else {})
    return configuration.parse({"models": {"shipped": entry}}, KEYS).models["shipped"]


def _configured(model: str, config: Path | None) -> ModelSettings | None:
    """Find a model of the configuration; a path is a path, whatever the configuration has."""
    if model.startswith(_PATH_BEGINS) or os.path.lexists(model):
        return None
    try:
        return configuration.read(config, KEYS).resolve(model)
    except ModelNotFound:
        return None


def _of_configured(settings: ModelSettings) -> Estimate:
    """Say what a supervisor would reserve for it, by what those of this user have learnt."""
    learnt = Learnt(state_directory())
    learnt.open()
    found = reckon(settings, learnt)
    if found.weights is not None or not settings.path:
        return Estimate(found.need, found.weights)
    try:
        return Estimate(found.need, ENGINES[settings.engine].weigh(settings))
    except weights.UnreadableModel as error:  # its need is declared, as it may be for files that cannot be read
        return Estimate(found.need, None, error.message)


def _of_files(model: str, pixels: int | None) -> Estimate:
    found = weights.measure(
        os.path.expanduser(model),  # noqa: PTH111 - never raises
        ollama_store=weights.default_store(),
        hf_cache=weights.default_cache(),
    )
    if found.format == "pipeline":
        working_set = weights.image_working_set(pixels or _PIXELS, 1)
    elif pixels is None:
        working_set = weights.text_working_set(found)
    else:
        raise InvalidRequest(f"--size: {model} makes no pictures")
    return Estimate(weights.need(found, working_set=working_set), found)


def _lines(name: str, found: Estimate) -> Iterator[str]:
    need = found.need
    if found.unread:
        yield f"{name}: files not read: {found.unread}"
    elif found.weights is None:
        yield f"{name}: no path, so nothing to read"
    else:
        yield from _files(found.weights)
    parts = [(need.tensors, "tensors"), (need.working_set, "working set"), (need.margin, "margin")]
    sum_of = " + ".join(f"{rounded_size(size)} {what}" for size, what in parts)
    how = {
        "estimated": sum_of,
        "learnt": f"learnt, as it took so much once; by its files {rounded_size(need.estimate)}",
        "declared": "declared",
    }
    yield f"need {rounded_size(need.total)}: {how[need.source]}"


def _files(model: Weights) -> Iterator[str]:
    facts = [
        "diffusers pipeline" if model.format == "pipeline" else model.format,
        model.quantisation,
        f"{model.tensors:,} tensors",
        f"{model.parameters:,} parameters" if model.parameters else "",
        f"context {model.context_length:,}" if model.context_length else "",
    ]
    yield f"{model.path}: {', '.join(fact for fact in facts if fact)}"
    for file in model.files[:_MOST_LINES]:
        yield f"  {rounded_size(file.bytes):>10}  {_short(file.path, model.path)}"
    if rest := model.files[_MOST_LINES:]:
        yield f"  {rounded_size(sum(file.bytes for file in rest)):>10}  in {len(rest):,} more files"


def _short(file: str, model: str) -> str:
    below = file.removeprefix(os.path.join(model, ""))  # noqa: PTH118 - with a slash at its end, once
    return os.path.basename(file) if below == file else below  # noqa: PTH119
