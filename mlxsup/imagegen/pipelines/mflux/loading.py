"""Loads a pipeline by mflux's own class: configured, quantised, with its LoRAs, and every weight in memory when it is done."""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxsup.imagegen.pipelines.mflux.folders import Base, Found, Kind
from mlxsup.imagegen.pipelines.mflux.pipeline import MfluxPipeline, Traits

if TYPE_CHECKING:
    from mlxsup.imagegen.pipelines.base import Progress
    from mlxsup.imagegen.pipelines.selection import Adaptation

MEND = "pip install 'mlxsup[mflux]'"

_IMPORTED, _BUILT = 0.1, 0.15
"""How much of the loading is done when mflux is imported, and when its model is put together; the rest are weights."""

_GUIDED = frozenset({"guidance"})
_DENIED = frozenset({"guidance", "negative_prompt"})


@dataclass(frozen=True)
class _Class:
    """Where mflux has the class of a pipeline, and the one that knows the form of its latents."""

    module: str
    name: str
    latents: str


_CLASSES: dict[Kind, _Class] = {
    "FLUX.1": _Class(
        "flux.variants.txt2img.flux", "Flux1", "flux.latent_creator.flux_latent_creator:FluxLatentCreator"
    ),
    "FLUX.2 Klein": _Class(
        "flux2.variants.txt2img.flux2_klein",
        "Flux2Klein",
        "flux2.latent_creator.flux2_latent_creator:Flux2LatentCreator",
    ),
    "Z-Image": _Class(
        "z_image.variants.z_image", "ZImage", "z_image.latent_creator.z_image_latent_creator:ZImageLatentCreator"
    ),
    "Qwen-Image": _Class(
        "qwen.variants.txt2img.qwen_image", "QwenImage", "qwen.latent_creator.qwen_latent_creator:QwenLatentCreator"
    ),
}

TRAITS: dict[Base, Traits] = {
    "dev": Traits(steps=25, guidance=3.5, honours=_GUIDED),
    "schnell": Traits(steps=4, guidance=0.0),
    "flux2-klein-4b": Traits(steps=4, guidance=1.0),
    "flux2-klein-9b": Traits(steps=4, guidance=1.0),
    "flux2-klein-base-4b": Traits(steps=50, guidance=4.0, honours=_GUIDED),
    "flux2-klein-base-9b": Traits(steps=50, guidance=4.0, honours=_GUIDED),
    "z-image": Traits(steps=50, guidance=4.0, honours=_DENIED),
    "z-image-turbo": Traits(steps=9, guidance=0.0),
    "qwen-image": Traits(steps=20, guidance=4.0, honours=_DENIED),
}
"""Steps are mflux's defaults, guidance what the models' cards use. Distilled models take no guidance, FLUX no negative prompt."""


def load(found: Found, adaptation: Adaptation, progress: Progress) -> MfluxPipeline:
    """Load a pipeline from its folder; nothing is downloaded.

    Raises:
        ValueError: mflux cannot be imported, or the weights or a LoRA do not fit the pipeline.
        OSError: something of the folder is missing or cannot be read.
    """
    _stay_quiet_and_offline()
    try:
        kind, latents = _classes(found.kind)
        config = _config(found)
    except ImportError as error:
        raise ValueError(f"mflux is not importable: {error}; mend: {MEND}") from error
    progress(_IMPORTED)
    model = kind(
        model_path=str(found.path),
        model_config=config,
        quantize=adaptation.quantize,
        lora_paths=[str(Path(lora.path).expanduser()) for lora in adaptation.loras] or None,
        lora_scales=[lora.scale for lora in adaptation.loras] or None,
    )
    _try_tokenizers(model)
    progress(_BUILT)
    _materialise(model, progress)
    return MfluxPipeline(model, latents, TRAITS[found.base])


def _stay_quiet_and_offline() -> None:
    """Must come before the first import; what the environment says already stays."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),
        ("TQDM_DISABLE", "1"),  # one line an event, and steps are told otherwise
        ("TRANSFORMERS_VERBOSITY", "error"),  # that there is no PyTorch
    ):
        os.environ.setdefault(name, value)


def _classes(kind: Kind) -> tuple[Any, Any]:
    where = _CLASSES[kind]
    module = importlib.import_module(f"mflux.models.{where.module}")
    latents, _, name = where.latents.partition(":")
    return getattr(module, where.name), getattr(importlib.import_module(f"mflux.models.{latents}"), name)


def _config(found: Found) -> Any:
    """Return mflux's settings of the base, with the dimensions that the folder tells in their place."""
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    config = copy.deepcopy(AVAILABLE_MODELS[found.base])
    config.transformer_overrides |= found.transformer
    config.text_encoder_overrides |= found.text_encoder
    return config


def _try_tokenizers(model: Any) -> None:
    """Tokenise a word: what transformers makes of a folder that lacks files fails only when it is used."""
    for name, tokenizer in model.tokenizers.items():
        try:
            tokenizer.tokenize("word")
        except BaseException as error:  # a panic of Rust is no Exception
            raise ValueError(f"the tokenizer {name} is broken: {error}") from error


def _materialise(model: Any, progress: Progress) -> None:
    """Read, convert and quantise the weights now, one by one: mflux leaves that to the first picture.

    It keeps what is read beside what is kept down to one tensor, and shows how far the loading has come.
    """
    leaves: Any = tree_flatten(model.parameters())
    arrays = [array for _, array in leaves if isinstance(array, mx.array)]
    total, done = sum(array.nbytes for array in arrays) or 1, 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        progress(_BUILT + (1 - _BUILT) * done / total)
    mx.clear_cache()
