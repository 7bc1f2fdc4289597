"""Write a FLUX.2 Klein of random weights, small enough for any machine: `python -m tests.real.tiny_flux2 FOLDER`.

Everything is made by mflux's own classes and saved by its own saver; beside the weights lie the configs that a diffusers
folder has, from which the dimensions are read. It draws coloured noise that depends on prompt, seed and the picture it starts from.
`--lora FILE` writes a LoRA for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mflux.models.common.tokenizer import LanguageTokenizer
from mflux.models.common.weights.saving.model_saver import ModelSaver
from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
from mflux.models.flux2.model.flux2_vae.encoder.encoder import Flux2Encoder
from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
from mflux.models.flux2.weights.flux2_weight_definition import Flux2KleinWeightDefinition
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 512
"""Tokens there are: bytes, and what marks a text's parts."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"

TEXT_ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 28,  # the prompt is read after the 27th
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 32,
}
TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * TEXT_ENCODER["hidden_size"],
    "timestep_guidance_channels": 64,
    "axes_dims_rope": [8, 8, 8, 8],
}
CHANNELS = (32, 64, 128, 128)
"""Of the autoencoder, which has shortcuts where they grow: at the same places as in the real one."""


class Tiny:
    """What mflux's saver looks for in a model."""

    def __init__(self) -> None:
        mx.random.seed(7)
        self.vae = Flux2VAE(decoder_block_out_channels=CHANNELS)
        self.vae.encoder = Flux2Encoder(block_out_channels=CHANNELS)
        self.transformer = Flux2Transformer(**TRANSFORMER)
        self.text_encoder = Qwen3TextEncoder(**TEXT_ENCODER)
        self.tokenizers = {"qwen3": byte_tokenizer()}


def write(folder: Path) -> None:
    """Make the model and save it."""
    folder.mkdir(parents=True, exist_ok=True)
    ModelSaver.save_model(Tiny(), None, str(folder), Flux2KleinWeightDefinition)
    _save(folder / "transformer/config.json", {"_class_name": "Flux2Transformer2DModel", **TRANSFORMER})
    _save(folder / "text_encoder/config.json", {"architectures": ["Qwen3ForCausalLM"], **TEXT_ENCODER})
    _save(
        folder / "model_index.json",
        {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": True,
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )


def write_lora(path: Path) -> None:
    """Make a LoRA of rank 4 for the attention of the double block."""
    mx.random.seed(8)
    side = TRANSFORMER["attention_head_dim"] * TRANSFORMER["num_attention_heads"]
    layer = "transformer.transformer_blocks.0.attn.to_q"
    shapes = {f"{layer}.lora_A.weight": (4, side), f"{layer}.lora_B.weight": (side, 4)}
    mx.save_safetensors(str(path), {name: mx.random.normal(shape) for name, shape in shapes.items()})


def byte_tokenizer() -> LanguageTokenizer:
    """Make a tokenizer for which each byte is a token."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = TEMPLATE
    return LanguageTokenizer(fast)


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    if sys.argv[1] == "--lora":
        write_lora(Path(sys.argv[2]))
    else:
        write(Path(sys.argv[1]))
