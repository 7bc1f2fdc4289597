"""Run mflux's own loops of FLUX.1, Z-Image and Qwen-Image on models put together by hand: `python -m tests.real.small_models KIND`.

mflux builds these at their full size only. Here autoencoders, and where their classes allow it transformers, are a fraction of
it, FLUX.1's transformer is a stand-in, and what a prompt would be encoded to is noise. Prints what was seen as JSON. With
`parts` for KIND it tells the outermost parts of each transformer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from mlxsup.imagegen.pipelines.base import Order, Preview
from mlxsup.imagegen.pipelines.mflux.folders import Base, Kind
from mlxsup.imagegen.pipelines.mflux.loading import TRAITS, _classes, _stay_quiet_and_offline
from mlxsup.imagegen.pipelines.mflux.pipeline import MfluxPipeline

WIDTH, HEIGHT, STEPS = 96, 64, 4
PROMPT = "a cat"


class StopError(Exception):
    """Raised between two steps."""


class StandIn(nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
    """Says where to go from here: to what the latents are, and a bit of the prompt."""

    def __call__(self, *, hidden_states: mx.array, prompt_embeds: mx.array, **_: Any) -> mx.array:
        return mx.tanh(hidden_states) + 0.1 * prompt_embeds.mean()


def noise(*shape: int) -> mx.array:
    return 0.1 * mx.random.normal(shape)


def thinned(module: nn.Module) -> nn.Module:
    """Give a module a quarter of its channels: what its layers compute with is the shape of their weights."""

    def thin(name: str, array: mx.array) -> mx.array:
        shape = [side // 4 if side >= 96 else side for side in array.shape]
        return mx.ones(shape) if "norm" in name and len(shape) != 2 else noise(*shape)

    leaves: Any = tree_flatten(module.parameters())
    module.update(tree_unflatten([(name, thin(name, array)) for name, array in leaves]))
    return module


def flux1() -> tuple[Base, Any]:
    from mflux.models.flux.model.flux_vae.vae import VAE
    from mflux.models.flux.variants.txt2img.flux import Flux1

    model = bare(Flux1, "dev")
    model.vae, model.transformer = thinned(VAE()), StandIn()
    model.t5_text_encoder = model.clip_text_encoder = None
    model.prompt_cache[PROMPT] = (noise(1, 8, 64), noise(1, 64))
    model.tokenizers = {"t5": None, "clip": None}
    return "dev", model


def z_image() -> tuple[Base, Any]:
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
    from mflux.models.z_image.model.z_image_vae.vae import VAE
    from mflux.models.z_image.variants.z_image import ZImage

    from tests.real.tiny_flux2 import TEXT_ENCODER, byte_tokenizer

    model = bare(ZImage, "z-image")
    model.vae = thinned(VAE())
    model.transformer = ZImageTransformer(
        dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=64, axes_dims=[8, 12, 12]
    )
    model.text_encoder = TextEncoder(**{**TEXT_ENCODER, "num_hidden_layers": 3})
    model.tokenizers = {"z_image": byte_tokenizer()}
    model.float32, model.compute_precision = False, ComputePrecision(None)
    return "z-image", model


def qwen_image() -> tuple[Base, Any]:
    from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
    from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE
    from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage

    model = bare(QwenImage, "qwen-image")
    model.vae = thinned(QwenVAE())
    model.transformer = QwenTransformer(num_layers=1, num_attention_heads=1, joint_attention_dim=64)
    model.text_encoder, model.tokenizers = None, {"qwen": None}
    mask = mx.ones((1, 8), dtype=mx.int32)
    model.prompt_cache[f"{PROMPT}|NEG| "] = (noise(1, 8, 64), mask, noise(1, 8, 64), mask)
    return "qwen-image", model


def bare(kind: Any, base: Base) -> Any:
    """Make an object of one of mflux's classes with what each has beside its parts."""
    from mflux.callbacks.callback_registry import CallbackRegistry
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.callbacks, model.model_config = CallbackRegistry(), AVAILABLE_MODELS[base]
    model.prompt_cache, model.tiling_config, model.bits = {}, None, None
    model.lora_paths, model.lora_scales = [], []
    return model


MODELS = {"FLUX.1": flux1, "Z-Image": z_image, "Qwen-Image": qwen_image}


def look(kind: Kind) -> dict[str, Any]:
    """Make some pictures and tell how that went."""
    mx.random.seed(3)
    mx.disable_compile()
    base, model = MODELS[kind]()
    pipeline = MfluxPipeline(model, _classes(kind)[1], TRAITS[base])
    seen: dict[str, Any] = {"steps": [], "edited": [], "previews": []}
    order = Order(PROMPT, WIDTH, HEIGHT, STEPS, seed=5, guidance=pipeline.default_guidance)

    def watch(step: int, total: int, preview: Preview | None = None, /) -> None:
        seen["steps"].append([step, total])
        if preview is not None:
            shown.append(preview())

    def stop(step: int, _total: int, _preview: Preview | None = None, /) -> None:
        if step == 2:
            raise StopError

    shown: list[Image.Image] = []
    first = pipeline.generate(order, watch)
    try:
        pipeline.generate(order, stop)
    except StopError:
        seen["stopped"] = True
    again = pipeline.generate(order, lambda *_: None)
    red = Image.new("RGB", (WIDTH, HEIGHT), "red")
    edit = Order(PROMPT, WIDTH, HEIGHT, STEPS, seed=5, guidance=order.guidance, images=(red,), strength=0.5)
    edited = pipeline.generate(edit, lambda step, total, *_: seen["edited"].append([step, total]))
    return {
        **seen,
        "size": first.size,
        "mode": first.mode,
        "levels": len(set(first.tobytes())),
        "previews": [picture.size for picture in shown],
        "last preview is the picture": shown[-1].tobytes() == first.tobytes(),
        "reproducible": again.tobytes() == first.tobytes(),
        "edit differs": edited.tobytes() != first.tobytes(),
        "prompts kept": len(getattr(model, "prompt_cache", {})),
    }


def parts() -> dict[Kind, list[str]]:
    """Name the outermost parts of each transformer; its arrays are never made."""
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
    from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer

    transformers: dict[Kind, Any] = {
        "FLUX.1": Transformer(AVAILABLE_MODELS["dev"], 1, 1),
        "FLUX.2 Klein": Flux2Transformer(),
        "Z-Image": ZImageTransformer(),
        "Qwen-Image": QwenTransformer(num_layers=1),
    }
    return {kind: _outermost(tree_flatten(transformer.parameters())) for kind, transformer in transformers.items()}


def _outermost(leaves: Any) -> list[str]:
    return sorted({name.partition(".")[0] for name, _ in leaves})


if __name__ == "__main__":
    _stay_quiet_and_offline()
    sys.stdout.write(json.dumps(parts() if sys.argv[1] == "parts" else look(sys.argv[1])))  # type: ignore[arg-type]
