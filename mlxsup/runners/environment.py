"""The environment a runner gets: an allow-list of ours, what the engine and the model add, nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from mlxsup.config import ModelSettings
from mlxsup.engines import Launch, environment

LIBRARY_PATH = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"


def build(model: ModelSettings, launch: Launch, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for one runner; the model's `env` wins over the engine's, that over what is passed on.

    Raises:
        LoadFailed: a value of the model's `env` names a variable that is not set.
    """
    ours = os.environ if environ is None else environ
    env = environment.passed(model, ours) | launch.env | environment.of_model(model, ours)
    folders = [*launch.library_dirs, *filter(None, env.get(LIBRARY_PATH, "").split(os.pathsep))]
    if launch.library_dirs:
        env[LIBRARY_PATH] = os.pathsep.join(dict.fromkeys(folders))
    return env
