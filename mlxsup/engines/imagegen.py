"""The `imagegen` engine: the MLX image runner of this package, in a Python process of its own.

Its models are the one that ships, and folders with a pipeline that mflux knows. What kind of pipeline a folder holds is the
runner's to find out; here only what is there is looked at, and how much memory it takes.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from mlxsup import weights
from mlxsup.config import ModelSettings
from mlxsup.config.rules import PathText
from mlxsup.engines import environment, wire
from mlxsup.engines.base import Address, Engine, Finding, Launch, Transport
from mlxsup.errors import EngineUnavailable, InvalidRequest, LoadFailed
from mlxsup.protocol import CompletionRequest, RunnerMemory
from mlxsup.weights import Weights

BUILTIN = frozenset({"builtin:emoji"})
"""The models that ship inside the package."""

_OPENBLAS = ("lib/*-linux-gnu/openblas-pthread/libopenblas.so.0", "lib64/libopenblasp.so.0", "lib/libopenblas.so.0")
"""Where Debian, Fedora and Arch keep the threaded OpenBLAS, below /usr."""

_MEND = "install 'mlxsup[{}]'"
_BUILTIN_FOLDER = Path(__file__).parents[1] / "imagegen" / "builtin"
_BUILTIN_PIXELS = 4096 * 4096
_BUILTIN_BYTES_PER_PIXEL = 12
"""The emoji model computes a small square and enlarges it: RGB, its resized copy and the PNG of it."""
_PIPELINE_PIXELS = 1024 * 1024
_NEEDED = ("mlx.core", "PIL")
_GROUP_BITS = 0.5
"""What quantisation adds to each weight: a scale and a bias of 16 bits for 64 of them."""
_PROBE = """
import importlib.util, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(next((name.partition(".")[0] for name in sys.argv[1:] if not found(name)), ""))
"""


class ImagegenKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `engine = "imagegen"`."""

    max_pixels: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | None,
        msgspec.Meta(
            description="width x height that memory is reserved for; unset: the pipeline's", examples=[1048576]
        ),
    ] = None
    quantize: Annotated[
        Literal[3, 4, 5, 6, 8] | None,
        msgspec.Meta(description="bits of a weight, unless stored quantised; unset: as they are stored", examples=[4]),
    ] = None
    lora_paths: Annotated[list[PathText], msgspec.Meta(description="files of LoRAs, added to the weights")] = []
    lora_scales: Annotated[
        list[float], msgspec.Meta(description="how strongly, one for each of lora_paths; unset: 1 each")
    ] = []

    def __post_init__(self) -> None:
        if self.lora_scales and len(self.lora_scales) != len(self.lora_paths):
            raise ValueError(
                f"lora_scales has {len(self.lora_scales)} for {len(self.lora_paths)} lora_paths: one each, or none"
            )


class ImagegenEngine(Engine):
    """MLX in a child process. On Linux it computes on the CPU, there with OpenBLAS where the system has it."""

    kind: ClassVar[str] = "imagegen"
    keys: ClassVar[type[msgspec.Struct]] = ImagegenKeys
    pictures: ClassVar[bool] = True

    def check(self, model: ModelSettings) -> None:
        """Refuse machines without MLX or mflux, paths that are no model, and LoRAs that are not there."""
        if sys.platform == "darwin" and platform.machine() != "arm64":
            raise _unavailable(model, "MLX needs Apple silicon (arm64); this Mac is " + platform.machine())
        if model.path not in BUILTIN and not _is_there(model):
            known = f"neither a folder, nor in {environment.hf_cache(model)}, nor one of {', '.join(sorted(BUILTIN))}"
            raise _refused(model, f"{model.path or '(no path)'} is no image model: {known}")
        keys = _keys(model)
        if model.path in BUILTIN and (keys.quantize or keys.lora_paths):
            raise _refused(model, f"{model.path} is used as it is: neither quantised nor with a LoRA")
        for path in keys.lora_paths:
            if not Path(path).is_file():
                raise _refused(model, f"no LoRA at {path}: there is no such file; the key is lora_paths")
        if missing := _missing_modules(model):
            where, pip = (f" by {model.python}", f"{model.python} -m pip") if model.python else ("", "pip")
            mend = _MEND.format("mflux" if missing == "mflux" else "imagegen")
            raise _unavailable(model, f"{missing} is not importable{where}; mend: {pip} {mend}")

    def transport(self, model: ModelSettings) -> Transport:
        """Our own runner can always listen on a unix socket."""
        del model
        return "unix"

    def launch(self, model: ModelSettings, address: Address) -> Launch:
        """Start `python -m mlxsup.imagegen`, which is what `mlxsup runner --imagegen-engine` runs."""
        listen = ("--socket", address.socket) if address.socket else ("--port", str(address.port))
        python = model.python or sys.executable
        argv = (
            python,
            "-P",
            "-m",
            "mlxsup.imagegen",
            "--imagegen-engine",
            "--model",
            model.path,
            *_limited(model),
            *_adapted(_keys(model)),
        )
        return Launch(
            argv=(*argv, *listen, "--ready-fd", Launch.READY_FD),
            env=_cpu_environment(),
            library_dirs=_mlx_library_dirs(model.python),
        )

    def read_health(self, status: int, body: bytes) -> Finding:
        """Read health as the wire has it."""
        return wire.read_health(status, body)

    def read_memory(self, body: bytes) -> RunnerMemory | None:
        """Read memory as the wire has it."""
        return wire.read_memory(body)

    def weigh(self, model: ModelSettings) -> Weights:
        """The models that ship are weighed in their folder, others as the runner will quantise them."""
        if model.path in BUILTIN:
            return weights.measure(str(_BUILTIN_FOLDER))
        found, keys = super().weigh(model), _keys(model)
        return _with_loras(_quantised(found, keys.quantize) if keys.quantize else found, keys.lora_paths)

    def working_set(self, model: ModelSettings, found: Weights) -> int:
        """What the largest picture takes that may be asked for, or what LoRAs take while they are folded in.

        For that mflux holds the transformer as it is stored beside the one that it makes of it, whatever `quantize` says. What
        is stored in fewer than 8 bits has 8 afterwards, so that it stays larger.
        """
        del found
        if model.path in BUILTIN:
            return max_pixels(model) * _BUILTIN_BYTES_PER_PIXEL
        picture = weights.image_working_set(max_pixels(model), 1)
        if not _keys(model).lora_paths:
            return picture
        stored = super().weigh(model)
        transformer = sum(file.bytes for file in stored.files if Path(file.path).parent.name == "transformer")
        return picture + transformer if stored.parameters is None else max(picture, transformer)

    def check_request(self, model: ModelSettings, request: CompletionRequest) -> None:
        """Refuse pictures larger than memory was reserved for; a side that is left open, and then the size, is the runner's."""
        super().check_request(model, request)
        if (model.path in BUILTIN and not _configured_pixels(model)) or not (request.width and request.height):
            return
        limit = max_pixels(model)
        if request.width * request.height > limit:
            size, key = f"{request.width} x {request.height}", f"models.{model.name}.max_pixels"
            raise InvalidRequest(
                f"{size} is more than the {limit} pixels that memory is reserved for; the key is {key}",
                details={"param": "width", "key": key},
            )

    def unsupported(self, request: CompletionRequest) -> list[str]:
        """Sampling options of text models mean nothing to an image runner."""
        return [field for field in request.fields_in_use() if field.startswith("options.")]


def max_pixels(model: ModelSettings) -> int:
    """Return the width x height that is reserved for: as configured, else the pipeline's own size squared."""
    return _configured_pixels(model) or (_BUILTIN_PIXELS if model.path in BUILTIN else _PIPELINE_PIXELS)


def _configured_pixels(model: ModelSettings) -> int | None:
    return _keys(model).max_pixels


def _keys(model: ModelSettings) -> ImagegenKeys:
    return model.options if isinstance(model.options, ImagegenKeys) else ImagegenKeys()


def _is_there(model: ModelSettings) -> bool:
    """Tell whether the path is a folder, or names one in the Hugging Face cache, which is a single `/` away from that."""
    path = model.path
    if not path or Path(path).is_dir():
        return bool(path)
    try:
        return weights.snapshot.find(path, environment.hf_cache(model)) is not None
    except weights.UnreadableModel:
        return False


def _limited(model: ModelSettings) -> list[str]:
    """The runner's argument for what memory is reserved for; the models that ship have bounds of their own."""
    return [] if model.path in BUILTIN and not _configured_pixels(model) else [f"--max-pixels={max_pixels(model)}"]


def _adapted(keys: ImagegenKeys) -> list[str]:
    """The runner's arguments that change the weights; joined by "=", so that none can be taken for another option."""
    quantize = [f"--quantize={keys.quantize}"] if keys.quantize else []
    loras = [f"--lora={path}" for path in keys.lora_paths]
    return [*quantize, *loras, *(f"--lora-scale={scale!r}" for scale in keys.lora_scales)]


def _quantised(found: Weights, bits: int) -> Weights:
    """Reckon what remains of weights: the autoencoder is convolutions, which stay; what is packed already stays too."""
    if found.parameters is None or not found.parameters:
        return found
    share = min(1.0, (bits + _GROUP_BITS) / (8 * found.tensor_bytes / found.parameters))
    files = tuple(
        file if Path(file.path).parent.name == "vae" else msgspec.structs.replace(file, bytes=round(file.bytes * share))
        for file in found.files
    )
    total = sum(file.bytes for file in files)
    return msgspec.structs.replace(found, files=files, tensor_bytes=total, quantisation=f"{bits}-bit")


def _with_loras(found: Weights, paths: list[str]) -> Weights:
    """Add the files of LoRAs, which are read whole while a model loads."""
    loras = [weights.measure(path) for path in paths]
    return msgspec.structs.replace(
        found,
        files=found.files + tuple(file for lora in loras for file in lora.files),
        tensor_bytes=found.tensor_bytes + sum(lora.tensor_bytes for lora in loras),
        tensors=found.tensors + sum(lora.tensors for lora in loras),
    )


def _refused(model: ModelSettings, why: str) -> LoadFailed:
    return LoadFailed(why, details={"permanent": True, "model": model.name, "cause": "missing_file"})


def _unavailable(model: ModelSettings, why: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"the imagegen engine cannot run here: {why}",
        details={"permanent": True, "model": model.name, "cause": "missing_library"},
    )


def _missing_modules(model: ModelSettings) -> str:
    """Name the first module that the runner needs and its interpreter has not, "" when all are there."""
    needed = _NEEDED if model.path in BUILTIN else (*_NEEDED, "mflux")
    if not model.python:
        return next((name.partition(".")[0] for name in needed if not _has_module(name)), "")
    command = [model.python, "-c", _PROBE, "mlxsup", *needed]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unavailable(model, f"{model.python} cannot be run: {error}; mend: correct its python key") from error
    if done.returncode != 0:
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _unavailable(model, f"{model.python} is no Python interpreter ({told}); mend: correct its python key")
    return done.stdout.strip()


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # the parent package is missing
        return False


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
