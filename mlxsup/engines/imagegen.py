"""The `imagegen` engine: the MLX image runner of this package, in a Python process of its own."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from mlxsup.config import ModelSettings
from mlxsup.engines import wire
from mlxsup.engines.base import Address, Engine, Finding, Launch, Transport
from mlxsup.errors import EngineUnavailable, LoadFailed
from mlxsup.protocol import CompletionRequest

BUILTIN = frozenset({"builtin:emoji"})
"""The models that ship inside the package."""

_OPENBLAS = ("lib/*-linux-gnu/openblas-pthread/libopenblas.so.0", "lib64/libopenblasp.so.0", "lib/libopenblas.so.0")
"""Where Debian, Fedora and Arch keep the threaded OpenBLAS, below /usr."""

_MEND = "pip install 'mlxsup[imagegen]'"


class ImagegenEngine(Engine):
    """MLX in a child process. On Linux it computes on the CPU, there with OpenBLAS where the system has it."""

    kind: ClassVar[str] = "imagegen"

    def check(self, model: ModelSettings) -> None:
        """Refuse machines without MLX, and paths that are no model."""
        if sys.platform == "darwin" and platform.machine() != "arm64":
            raise _unavailable(model, "MLX needs Apple silicon (arm64); this Mac is " + platform.machine())
        for package in ("mlx.core", "PIL"):
            if not _has_module(model.python, package):
                raise _unavailable(model, f"{package.partition('.')[0]} is not importable; mend: {_MEND}")
        if model.path not in BUILTIN and not Path(model.path).is_dir():
            known = ", ".join(sorted(BUILTIN))
            raise LoadFailed(
                f"{model.path or '(no path)'} is no image model: neither a folder nor one of {known}",
                details={"permanent": True, "model": model.name, "cause": "missing_file"},
            )

    def transport(self, model: ModelSettings) -> Transport:
        """Our own runner can always listen on a unix socket."""
        del model
        return "unix"

    def launch(self, model: ModelSettings, address: Address) -> Launch:
        """Start `python -m mlxsup.imagegen`, which is what `mlxsup runner --imagegen-engine` runs."""
        listen = ("--socket", address.socket) if address.socket else ("--port", str(address.port))
        python = model.python or sys.executable
        argv = (python, "-m", "mlxsup.imagegen", "--imagegen-engine", "--model", model.path, *listen)
        return Launch(
            argv=(*argv, "--ready-fd", Launch.READY_FD),
            env=_cpu_environment(),
            library_dirs=_mlx_library_dirs(model.python),
        )

    def read_health(self, status: int, body: bytes) -> Finding:
        """Read health as the wire has it."""
        return wire.read_health(status, body)

    def unsupported(self, request: CompletionRequest) -> list[str]:
        """Sampling options of text models mean nothing to an image runner."""
        return [field for field in request.fields_in_use() if field.startswith("options.")]


def _unavailable(model: ModelSettings, why: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"the imagegen engine cannot run here: {why}",
        details={"permanent": True, "model": model.name, "cause": "missing_library"},
    )


def _has_module(python: str, package: str) -> bool:
    if not python:
        try:
            return importlib.util.find_spec(package) is not None
        except ImportError:  # the parent package is missing
            return False
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        done = subprocess.run([python, "-c", probe, package], cwd="/", capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _mlx_library_dirs(python: str) -> tuple[str, ...]:
    """MLX's library folder and its `mlx_*` back ends, for wheels whose libraries do not find each other."""
    spec = None if python else importlib.util.find_spec("mlx")
    places = (spec.submodule_search_locations if spec else None) or ()
    bases = [base for place in places if (base := Path(place) / "lib").is_dir()]
    return tuple(str(folder) for base in bases for folder in (base, *sorted(base.glob("mlx_*"))))


@lru_cache(maxsize=1)
def _cpu_environment() -> dict[str, str]:
    """What makes MLX usable on a Linux CPU.

    The wheel's reference BLAS is ~40 times slower than OpenBLAS, so that is preloaded where it is found; `mx.compile` would
    call a C++ compiler for many seconds at the first picture.
    """
    if sys.platform != "linux":
        return {}
    found = [str(library) for pattern in _OPENBLAS for library in sorted(Path("/usr").glob(pattern))]
    return {"MLX_DISABLE_COMPILE": "1"} | ({"LD_PRELOAD": found[0]} if found else {})
