"""What of our environment, and of its own `env`, a runner sees: with that it looks for its model, so we do, too."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence

from mlxsup import weights
from mlxsup.config import ModelSettings
from mlxsup.config.rules import VARIABLE
from mlxsup.errors import LoadFailed

ALLOWED = (
    *("PATH", "HOME", "USER", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "SSL_CERT_*"),
    *("CUDA_*", "NVIDIA_*", "MLX_*", "METAL_*", "OPENBLAS_*", "OMP_NUM_THREADS"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
)
"""Names (with `*`) of variables that pass from the supervisor to every runner; `pass_env` adds to them."""


def passed(model: ModelSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environ` that pass to the model's runner."""
    allowed: Sequence[str] = (*ALLOWED, *model.pass_env)
    return {
        name: value for name, value in environ.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
    }


def of_model(model: ModelSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the model's `env` with `${VAR}` filled in from `environ`.

    Raises:
        LoadFailed: a value names a variable that is not set.
    """
    for name, value in model.env.items():
        for variable in VARIABLE.findall(value):
            if variable not in environ:
                raise LoadFailed(
                    f"models.{model.name}.env.{name} names ${{{variable}}}, which is not set; set it where mlxsup is started",
                    details={"permanent": True, "model": model.name},
                )
    return _filled(model, environ)


def hf_cache(model: ModelSettings, environ: Mapping[str, str] | None = None) -> str:
    """Return the Hugging Face cache of the model's runner. A variable of its `env` that is not set is left to its start."""
    ours = os.environ if environ is None else environ
    return weights.default_cache(passed(model, ours) | _filled(model, ours))


def ollama_store(model: ModelSettings, environ: Mapping[str, str] | None = None) -> str:
    """Return the Ollama store in which the model is looked up: the one its `env` names, else ours."""
    ours = os.environ if environ is None else environ
    return weights.default_store({**ours, **_filled(model, ours)})


def _filled(model: ModelSettings, environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: VARIABLE.sub(lambda match: environ.get(match[1], match[0]), value) for name, value in model.env.items()
    }
