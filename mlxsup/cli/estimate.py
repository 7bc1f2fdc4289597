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
from mlxsup.config import rounded_size
from mlxsup.engines import KEYS
from mlxsup.errors import InvalidRequest, ModelNotFound
from mlxsup.weights import Need, Weights

_BUILTIN: Final = "builtin:"
_BUILTIN_FOLDER: Final = Path(__file__).parents[1] / "imagegen" / "builtin"
_SIDES = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_MOST_LINES: Final = 40


class Estimate(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    need: Need
    weights: Weights


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
    size: Annotated[str, Parameter(help="Of one picture, for models that make them: WIDTHxHEIGHT.")] = "1024x1024",
    json: Json = False,
    config: Config = None,
) -> int:
    """Tell how much memory a model will need, from the headers of its files."""
    sides = _SIDES.fullmatch(size)
    if not sides:
        raise InvalidRequest(f"--size: expected WIDTHxHEIGHT such as 1024x1024, not {size!r}")
    measured = weights.measure(
        _path_of(model, config), ollama_store=weights.default_store(), hf_cache=weights.default_cache()
    )
    if measured.format == "pipeline":
        working_set = weights.image_working_set(int(sides[1]), int(sides[2]))
    else:
        working_set = weights.text_working_set(measured)
    found = Estimate(weights.need(measured, working_set=working_set), measured)
    if json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(found))
    return 0


def _path_of(model: str, config: Path | None) -> str:
    """Take a path as it is; else look among the configured models; else leave the name to the stores."""
    path = os.path.expanduser(model)  # noqa: PTH111 - never raises
    if not os.path.lexists(path) and "/" not in model and not model.startswith(_BUILTIN):
        try:
            settings = configuration.read(config, KEYS).resolve(model)
        except ModelNotFound:
            return model
        path = settings.path
        if not path:
            raise InvalidRequest(f"models.{settings.name} has no path: nothing can be read of it")
    if path.startswith(_BUILTIN):
        return str(_BUILTIN_FOLDER / f"{path.removeprefix(_BUILTIN)}.safetensors")
    return path


def _lines(found: Estimate) -> Iterator[str]:
    model, need = found.weights, found.need
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
    parts = [(need.tensors, "tensors"), (need.working_set, "working set"), (need.margin, "margin")]
    yield f"need {rounded_size(need.total)}: {' + '.join(f'{rounded_size(size)} {what}' for size, what in parts)}"


def _short(file: str, model: str) -> str:
    below = file.removeprefix(os.path.join(model, ""))  # noqa: PTH118 - with a slash at its end, once
    return os.path.basename(file) if below == file else below  # noqa: PTH119
