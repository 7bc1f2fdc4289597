"""Which pipeline of mflux a folder holds, by its JSON files alone: neither MLX nor mflux is imported.

A diffusers folder says it in `model_index.json`. A folder that mflux saved has no such file; there the tensors' names tell,
which stand in the index of the transformer, and where these leave it open the folder's own name, as in mflux.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxsup.imagegen.pipelines.selection import NoSuchModelError

Kind = Literal["FLUX.1", "FLUX.2 Klein", "Z-Image", "Qwen-Image"]
Base = Literal[
    "dev",
    "schnell",
    "flux2-klein-4b",
    "flux2-klein-9b",
    "flux2-klein-base-4b",
    "flux2-klein-base-9b",
    "z-image",
    "z-image-turbo",
    "qwen-image",
]
"""mflux's own names of the models whose settings are used."""

INDEX = "model_index.json"
_CONFIG = "config.json"
_SAVED_INDEX = "transformer/model.safetensors.index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_TURBO_SHIFT = 3.0
"""Of Z-Image-Turbo's scheduler; the undistilled model has 6."""

_CLASSES: dict[str, tuple[Kind, str]] = {
    "FluxPipeline": ("FLUX.1", "FluxTransformer2DModel"),
    "Flux2KleinPipeline": ("FLUX.2 Klein", "Flux2Transformer2DModel"),
    "ZImagePipeline": ("Z-Image", "ZImageTransformer2DModel"),
    "QwenImagePipeline": ("Qwen-Image", "QwenImageTransformer2DModel"),
}
"""Pipelines by their class in diffusers, with that of the transformer."""

_FLUX1 = {"x_embedder", "context_embedder", "time_text_embed", "transformer_blocks", "single_transformer_blocks"}
_FLUX2 = {"x_embedder", "context_embedder", "time_guidance_embed", "transformer_blocks", "single_transformer_blocks"}
_SAVED: dict[Kind, set[str]] = {
    "FLUX.1": {*_FLUX1, "norm_out", "proj_out"},
    "FLUX.2 Klein": {
        *_FLUX2,
        *{"double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"},
        *{"norm_out", "proj_out"},
    },
    "Z-Image": {
        *{"all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token"},
        *{"noise_refiner", "context_refiner", "layers"},
    },
    "Qwen-Image": {"img_in", "txt_norm", "txt_in", "time_text_embed", "transformer_blocks", "norm_out", "proj_out"},
}
"""The outermost parts of each transformer, as mflux names and saves them."""

_KLEIN_BLOCKS = {5: "4b", 8: "9b"}
"""FLUX.2 Klein's sizes by how many double blocks they have."""

_TRANSFORMER_KEYS = frozenset({
    *{"patch_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim"},
    *{"num_attention_heads", "joint_attention_dim", "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope"},
    *{"rope_theta", "guidance_embeds"},
})  # fmt: skip
_TEXT_ENCODER_KEYS = frozenset({
    *{"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"},
    *{"intermediate_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "head_dim", "attention_bias"},
})  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A pipeline's folder.

    Attributes:
        path: the folder.
        kind: the pipeline.
        base: the model of that pipeline whose settings it is used with.
        transformer: dimensions that its configs tell, by mflux's names; empty where they are the base's.
        text_encoder: likewise.
    """

    path: Path
    kind: Kind
    base: Base
    transformer: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)


def identify(folder: Path) -> Found:
    """Find out which pipeline a folder holds.

    Raises:
        NoSuchModelError: none that is known, or one of its JSON files cannot be read.
    """
    from mlxsup.weights import UnreadableModel

    try:
        if (folder / INDEX).is_file():
            return _from_diffusers(folder)
        if (folder / _SAVED_INDEX).is_file():
            return _from_mflux(folder)
    except UnreadableModel as error:
        raise NoSuchModelError(f"no model at {folder}: {error.message}") from error
    except OSError as error:
        raise NoSuchModelError(f"no model at {folder}: {error.strerror or error}") from error
    told = f"it has no {INDEX}, and is not what mflux saves"
    raise NoSuchModelError(f"no model at {folder}: this is nothing that the image runner can load: {told}")


def _from_diffusers(folder: Path) -> Found:
    index = _read(folder / INDEX)
    name = index.get("_class_name") or index.get("architecture")
    if not isinstance(name, str) or name not in _CLASSES:
        what = f"is a {str(name)[:80]}" if name else "names no pipeline"
        raise _unknown(folder, f"{INDEX} {what}; known are {', '.join(_CLASSES)}")
    kind, transformer = _CLASSES[name]
    component = index.get("transformer")
    if isinstance(component, list) and len(component) == 2 and component[1] != transformer:
        raise _unknown(folder, f"a {name} with a {str(component[1])[:80]}; known is {transformer}")
    config = _read(folder / "transformer" / _CONFIG)
    match kind:
        case "FLUX.1":
            return Found(folder, kind, "dev" if config.get("guidance_embeds") else "schnell")
        case "FLUX.2 Klein":
            distilled = index.get("is_distilled")
            blocks = config.get("num_layers")
            return Found(
                folder,
                kind,
                _klein(folder, blocks, distilled=distilled if isinstance(distilled, bool) else None),
                _dimensions(config, _TRANSFORMER_KEYS),
                _dimensions(_read(folder / "text_encoder" / _CONFIG), _TEXT_ENCODER_KEYS),
            )
        case "Z-Image":
            turbo = _read(folder / _SCHEDULER).get("shift") == _TURBO_SHIFT
            return Found(folder, kind, _z_image(folder, turbo=turbo))
        case "Qwen-Image":
            return Found(folder, kind, "qwen-image")


def _from_mflux(folder: Path) -> Found:
    tensors = _read(folder / _SAVED_INDEX).get("weight_map")
    names = [name for name in tensors if isinstance(name, str)] if isinstance(tensors, dict) else []
    parts = {name.partition(".")[0] for name in names}
    kind = next((kind for kind, expected in _SAVED.items() if parts == expected), None)
    match kind:
        case "FLUX.1":
            guided = any(name.startswith("time_text_embed.guidance_embedder.") for name in names)
            return Found(folder, kind, "dev" if guided else "schnell")
        case "FLUX.2 Klein":
            blocks = len({name.split(".")[1] for name in names if name.startswith("transformer_blocks.")})
            if blocks not in _KLEIN_BLOCKS:
                sizes = " or ".join(map(str, _KLEIN_BLOCKS))
                raise _unknown(folder, f"a transformer of FLUX.2 with {blocks} double blocks, where Klein has {sizes}")
            return Found(folder, kind, _klein(folder, blocks, distilled=None))
        case "Z-Image":
            return Found(folder, kind, _z_image(folder, turbo=False))
        case "Qwen-Image":
            return Found(folder, kind, "qwen-image")
        case _:
            raise _unknown(folder, f"{_SAVED_INDEX} is of none of {', '.join(_SAVED)}")


def _klein(folder: Path, blocks: object, *, distilled: bool | None) -> Base:
    """Choose the nearest of FLUX.2 Klein's models; a folder that says nothing else is undistilled if its name has "base"."""
    large = blocks == 8
    if "base" in _name(folder) if distilled is None else not distilled:
        return "flux2-klein-base-9b" if large else "flux2-klein-base-4b"
    return "flux2-klein-9b" if large else "flux2-klein-4b"


def _z_image(folder: Path, *, turbo: bool) -> Base:
    return "z-image-turbo" if turbo or "turbo" in _name(folder) else "z-image"


def _name(folder: Path) -> str:
    """Return what a folder is called, for a snapshot of the Hugging Face cache the name of its repository."""
    whole = folder.resolve()
    return (whole.parents[1] if whole.parent.name == "snapshots" else whole).name.lower()


def _dimensions(config: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in keys and value is not None}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; one that is not there is empty."""
    from mlxsup.weights.reading import loose_json_file

    return loose_json_file(path) if path.is_file() else {}


def _unknown(folder: Path, why: str) -> NoSuchModelError:
    return NoSuchModelError(f"no model at {folder}: {why}")
