"""Which pipeline a folder or a name means, told by its JSON files before anything of it is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsup.imagegen.pipelines.catalog import resolve
from mlxsup.imagegen.pipelines.mflux.folders import identify
from mlxsup.imagegen.pipelines.selection import Adaptation, Lora, NoSuchModelError, paired

FLUX1 = ["context_embedder", "norm_out", "proj_out", "single_transformer_blocks", "transformer_blocks", "x_embedder"]
FLUX2 = [
    *FLUX1,
    *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
    "time_guidance_embed",
]
Z_IMAGE = [
    *("all_final_layer", "all_x_embedder", "cap_embedder", "cap_pad_token", "context_refiner", "layers"),
    *("noise_refiner", "t_embedder", "x_pad_token"),
]
QWEN = ["img_in", "norm_out", "proj_out", "time_text_embed", "transformer_blocks", "txt_in", "txt_norm"]


def write(folder: Path, **files: dict[str, Any] | str) -> Path:
    """Write JSON files; in their names `__` stands for `/`."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def pipeline(name: str, **components: Any) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": "0.36.0", **components}


def saved(folder: Path, names: list[str]) -> Path:
    """A folder as mflux saves it, as far as names go."""
    weights = dict.fromkeys(names, "0.safetensors")
    path = folder / "transformer/model.safetensors.index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"metadata": {"mflux_version": "0.24.0"}, "weight_map": weights}))
    return folder


def blocks(count: int) -> list[str]:
    return [f"transformer_blocks.{number}.attn.to_q.weight" for number in range(count)]


class TestDiffusers:
    @pytest.mark.parametrize(
        ("name", "files", "kind", "base"),
        [
            ("FluxPipeline", {"transformer__config": {"guidance_embeds": True}}, "FLUX.1", "dev"),
            ("FluxPipeline", {"transformer__config": {"guidance_embeds": False}}, "FLUX.1", "schnell"),
            ("Flux2KleinPipeline", {"transformer__config": {"num_layers": 5}}, "FLUX.2 Klein", "flux2-klein-4b"),
            ("Flux2KleinPipeline", {"transformer__config": {"num_layers": 8}}, "FLUX.2 Klein", "flux2-klein-9b"),
            ("ZImagePipeline", {"scheduler__scheduler_config": {"shift": 3.0}}, "Z-Image", "z-image-turbo"),
            ("ZImagePipeline", {"scheduler__scheduler_config": {"shift": 6.0}}, "Z-Image", "z-image"),
            ("QwenImagePipeline", {}, "Qwen-Image", "qwen-image"),
        ],
    )
    def test_the_class_and_the_configs_tell(
        self, tmp_path: Path, name: str, files: dict[str, Any], kind: str, base: str
    ) -> None:
        found = identify(write(tmp_path / "model", model_index=pipeline(name), **files))
        assert (found.kind, found.base) == (kind, base)

    def test_architecture_stands_for_the_class(self, tmp_path: Path) -> None:
        assert identify(write(tmp_path, model_index={"architecture": "QwenImagePipeline"})).kind == "Qwen-Image"

    @pytest.mark.parametrize(
        ("distilled", "folder", "base"),
        [
            (True, "FLUX.2-klein-base-4B", "flux2-klein-4b"),
            (False, "FLUX.2-klein-4B", "flux2-klein-base-4b"),
            (None, "FLUX.2-klein-4B", "flux2-klein-4b"),
            (None, "FLUX.2-klein-base-4B", "flux2-klein-base-4b"),
        ],
    )
    def test_klein_is_distilled_as_it_says_else_by_its_name(
        self, tmp_path: Path, distilled: bool | None, folder: str, base: str
    ) -> None:
        said = {} if distilled is None else {"is_distilled": distilled}
        assert identify(write(tmp_path / folder, model_index=pipeline("Flux2KleinPipeline", **said))).base == base

    def test_dimensions_of_klein_are_those_of_its_configs(self, tmp_path: Path) -> None:
        found = identify(
            write(
                tmp_path,
                model_index=pipeline("Flux2KleinPipeline"),
                transformer__config={
                    "_class_name": "T",
                    "num_layers": 1,
                    "axes_dims_rope": [8, 8],
                    "out_channels": None,
                },
                text_encoder__config={"architectures": ["Q"], "hidden_size": 64, "torch_dtype": "bfloat16"},
            )
        )
        assert found.transformer == {"num_layers": 1, "axes_dims_rope": [8, 8]}
        assert found.text_encoder == {"hidden_size": 64}

    @pytest.mark.parametrize(
        ("index", "words"),
        [
            (
                pipeline("StableDiffusionXLPipeline"),
                "model_index.json is a StableDiffusionXLPipeline; known are FluxPip",
            ),
            (pipeline("FluxFillPipeline"), "model_index.json is a FluxFillPipeline"),
            ({"_class_name": ["FluxPipeline"]}, "model_index.json is a ['FluxPipeline']"),
            ({}, "model_index.json names no pipeline"),
            (
                pipeline("QwenImagePipeline", transformer=["diffusers", "QwenImage21Transformer2DModel"]),
                "a QwenImagePipeline with a QwenImage21Transformer2DModel; known is QwenImageTransformer2DModel",
            ),
            ("[]", "model_index.json: not a JSON object"),
            ("{", "model_index.json: not JSON"),
        ],
    )
    def test_anything_else_is_told_with_what_is_known(self, tmp_path: Path, index: Any, words: str) -> None:
        with pytest.raises(NoSuchModelError, match=re.escape(words)) as caught:
            resolve(str(write(tmp_path, model_index=index)))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


class TestSavedByMflux:
    @pytest.mark.parametrize(
        ("folder", "names", "kind", "base"),
        [
            ("flux", [*FLUX1, "time_text_embed.guidance_embedder.linear_1.weight"], "FLUX.1", "dev"),
            ("flux", [*FLUX1, "time_text_embed.text_embedder.linear_1.weight"], "FLUX.1", "schnell"),
            ("klein", [*FLUX2, *blocks(5)], "FLUX.2 Klein", "flux2-klein-4b"),
            ("klein-base", [*FLUX2, *blocks(8)], "FLUX.2 Klein", "flux2-klein-base-9b"),
            ("Z-Image-Turbo-4bit", Z_IMAGE, "Z-Image", "z-image-turbo"),
            ("z", Z_IMAGE, "Z-Image", "z-image"),
            ("q", QWEN, "Qwen-Image", "qwen-image"),
        ],
    )
    def test_the_names_of_its_tensors_tell(
        self, tmp_path: Path, folder: str, names: list[str], kind: str, base: str
    ) -> None:
        names = [name for name in names if name != "transformer_blocks" or kind != "FLUX.2 Klein"]
        found = identify(saved(tmp_path / folder, names))
        assert (found.kind, found.base) == (kind, base)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ([], "is of none of FLUX.1, FLUX.2 Klein, Z-Image, Qwen-Image"),
            ([*QWEN, "zero_cond"], "is of none of FLUX.1, FLUX.2 Klein, Z-Image, Qwen-Image"),
            ([*FLUX2, *blocks(3)], "a transformer of FLUX.2 with 3 double blocks, where Klein has 5 or 8"),
        ],
    )
    def test_anything_else_is_told(self, tmp_path: Path, names: list[str], words: str) -> None:
        names = [name for name in names if name != "transformer_blocks" or words[0] != "a"]
        with pytest.raises(NoSuchModelError, match=re.escape(words)):
            identify(saved(tmp_path / "m", names))


class TestNames:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A Hugging Face cache with one model, which its name alone tells to be the distilled one."""
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        snapshot = tmp_path / "hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0123abc"
        return write(snapshot, model_index=pipeline("ZImagePipeline"))

    @pytest.mark.parametrize("revision", ["", "@0123abc"])
    def test_a_model_of_the_cache(self, cache: Path, revision: str) -> None:
        load: Any = resolve(f"Tongyi-MAI/Z-Image-Turbo{revision}")
        assert (load.args[0].path, load.args[0].base) == (cache, "z-image-turbo")

    def test_a_repository_of_the_cache_by_its_path(self, cache: Path) -> None:
        load: Any = resolve(str(cache.parents[1]))
        assert load.args[0].path == cache

    def test_one_that_is_not_there_is_not_downloaded(self, cache: Path) -> None:
        with pytest.raises(NoSuchModelError, match="nothing is downloaded") as caught:
            resolve("black-forest-labs/FLUX.1-dev")
        assert str(cache.parents[2]) in str(caught.value)

    def test_a_revision_that_is_not_there(self, cache: Path) -> None:
        with pytest.raises(NoSuchModelError, match="no revision 'v2' in the cache"):
            resolve("Tongyi-MAI/Z-Image-Turbo@v2")

    def test_a_file(self) -> None:
        with pytest.raises(NoSuchModelError, match="give its folder"):
            resolve(__file__)

    def test_neither_mlx_nor_mflux_is_imported(self, cache: Path) -> None:
        code = (
            "import sys; from mlxsup.imagegen.pipelines.catalog import resolve; resolve(sys.argv[1]);"
            "print([name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mflux', 'PIL')])"
        )
        command = [sys.executable, "-c", code, str(cache)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


class TestAdaptation:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        return str(write(tmp_path, model_index=pipeline("QwenImagePipeline")))

    def test_it_reaches_the_loader(self, folder: str) -> None:
        adaptation = Adaptation(4, (Lora(__file__, 0.5),))
        load: Any = resolve(folder, adaptation)
        assert load.args[1] == adaptation

    @pytest.mark.parametrize(
        ("adaptation", "words"),
        [
            (Adaptation(7), "no quantisation to 7 bits; there is 3, 4, 5, 6, 8"),
            (Adaptation(loras=(Lora("/nowhere/lora"),)), "no LoRA at /nowhere/lora: there is no such file"),
        ],
    )
    def test_what_is_not_there(self, folder: str, adaptation: Adaptation, words: str) -> None:
        with pytest.raises(NoSuchModelError, match=re.escape(words)):
            resolve(folder, adaptation)

    @pytest.mark.parametrize("adaptation", [Adaptation(4), Adaptation(loras=(Lora(__file__),))])
    def test_what_ships_is_used_as_it_is(self, adaptation: Adaptation) -> None:
        with pytest.raises(NoSuchModelError, match="builtin:emoji is used as it is"):
            resolve("builtin:emoji", adaptation)

    def test_scales_go_with_paths(self) -> None:
        assert paired(["a", "b"], []) == (Lora("a", 1.0), Lora("b", 1.0))
        assert paired(["a", "b"], [0.5, -1.0]) == (Lora("a", 0.5), Lora("b", -1.0))
        with pytest.raises(NoSuchModelError, match="2 LoRAs and 1 scales"):
            paired(["a", "b"], [0.5])
