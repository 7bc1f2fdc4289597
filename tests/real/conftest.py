"""The environment that has mflux, and a model of random weights made with it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlxsup import Supervisor
from mlxsup.config import built_in, parse
from mlxsup.engines import ENGINES, KEYS, Address

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/real-mflux/bin/python"
PATIENCE = 200.0
"""Seconds for a program of mflux's; on a quiet machine it is 4."""


def run(*arguments: str) -> str:
    """Run a module of this folder in that environment, as a runner would be; return what it prints."""
    command = [str(PYTHON), "-m", *arguments]
    emoji = built_in(KEYS).models["emoji"]
    env = {**os.environ, **ENGINES["imagegen"].launch(emoji, Address(port=1)).env, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(*arguments: str) -> Any:
    """Run a module that prints JSON."""
    return json.loads(run(*arguments))


def supervisor(folder: Path, **keys: Any) -> Supervisor:
    """A supervisor of one model, `flux`, in the folder."""
    entry = {"engine": "imagegen", "path": str(folder), "python": str(PYTHON), "max_pixels": 256 * 256, **keys}
    return Supervisor(parse({"models": {"flux": entry}}, KEYS))


@pytest.fixture(scope="session", autouse=True)
def with_mflux() -> None:
    """Say how to make the environment where it is not there."""
    if not PYTHON.exists():
        pytest.exit(f"there is no {PYTHON}: run `make test-real`", returncode=2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small FLUX.2 Klein."""
    folder = tmp_path_factory.mktemp("models") / "FLUX.2-klein-tiny"
    run("tests.real.tiny_flux2", str(folder))
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for that model."""
    file = tmp_path_factory.mktemp("loras") / "style.safetensors"
    run("tests.real.tiny_flux2", "--lora", str(file))
    return file
