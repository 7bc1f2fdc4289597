"""The environment a runner gets: an allow-list of ours, what the engine and the model add, nothing else."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Mapping, Sequence

from mlxsup.config import ModelSettings
from mlxsup.engines import Launch
from mlxsup.errors import LoadFailed

ALLOWED = (
    *("PATH", "HOME", "USER", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*"),
    *("HF_HOME", "HF_HUB_CACHE", "SSL_CERT_*"),
    *("CUDA_*", "NVIDIA_*", "MLX_*", "METAL_*", "OPENBLAS_*", "OMP_NUM_THREADS"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
)
"""Names (with `*`) of variables that pass from the supervisor to every runner; `pass_env` adds to them."""

LIBRARY_PATH = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def build(model: ModelSettings, launch: Launch, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for one runner; the model's `env` wins over the engine's, that over what is passed on.

    Raises:
        LoadFailed: a value of the model's `env` names a variable that is not set.
    """
    ours = os.environ if environ is None else environ
    env = passed(ours, (*ALLOWED, *model.pass_env))
    env |= launch.env
    for name, value in model.env.items():
        env[name] = _expand(model, name, value, ours)
    folders = [*launch.library_dirs, *filter(None, env.get(LIBRARY_PATH, "").split(os.pathsep))]
    if launch.library_dirs:
        env[LIBRARY_PATH] = os.pathsep.join(dict.fromkeys(folders))
    return env


def passed(environ: Mapping[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """Return the variables of `environ` whose names match one of `allowed`."""
    return {
        name: value for name, value in environ.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
    }


def _expand(model: ModelSettings, name: str, value: str, environ: Mapping[str, str]) -> str:
    def fill(match: re.Match[str]) -> str:
        if match[1] in environ:
            return environ[match[1]]
        raise LoadFailed(
            f"models.{model.name}.env.{name} names ${{{match[1]}}}, which is not set; set it where mlxsup is started",
            details={"permanent": True, "model": model.name},
        )

    return _VARIABLE.sub(fill, value)
