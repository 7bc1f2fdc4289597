"""The image engine: refused before anything is spawned where it cannot run, and launched as its runner wants it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsup.config import ModelSettings, parse
from mlxsup.engines import ENGINES, KEYS, Address, Engine, Launch
from mlxsup.engines import imagegen as imagegen_module
from mlxsup.errors import ConfigError, EngineUnavailable, LoadFailed, NotSupported
from mlxsup.learnt import Learnt
from mlxsup.machine import reckon
from mlxsup.protocol import CompletionRequest, Options

ENGINE: Engine = ENGINES["imagegen"]


def model(path: str = "builtin:emoji", **keys: Any) -> ModelSettings:
    return parse({"models": {"pic": {"engine": "imagegen", "path": path, **keys}}}, KEYS).models["pic"]


def interpreter(folder: Path, *packages: str) -> str:
    """An interpreter in which only these packages can be imported."""
    hidden = [name for name in ("mlx", "PIL", "mlxsup") if name not in packages]
    path = folder / "python"
    block = folder / "site"
    block.mkdir(exist_ok=True)
    (block / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {hidden!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    path.write_text(f'#!/bin/sh\nPYTHONPATH={block}:{Path(__file__).parents[2]} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def write(path: Path, dtype: str, shape: tuple[int, int]) -> None:
    """Write a file of one tensor, without its bytes."""
    size = shape[0] * shape[1] * {"F16": 2, "BF16": 2, "U32": 4}[dtype]
    header = json.dumps({"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


class TestCheck:
    @pytest.fixture(autouse=True)
    def with_mlx(self) -> None:
        if not importlib.util.find_spec("mlx"):
            pytest.skip("needs the extra imagegen")

    @pytest.fixture
    def with_mflux(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if mflux were installed."""
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "mflux" else found(name))

    def test_what_ships_is_fine_here(self) -> None:
        ENGINE.check(model())

    def test_a_folder_may_be_a_model(self, tmp_path: Path, with_mflux: None) -> None:
        ENGINE.check(model(str(tmp_path)))

    def test_so_may_a_name_of_the_cache(
        self, tmp_path: Path, with_mflux: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        (tmp_path / "models--org--name/snapshots/0123").mkdir(parents=True)
        ENGINE.check(model("org/name"))
        ENGINE.check(model("org/name@0123"))
        for path in ("org/other", "org/name@v2"):
            with pytest.raises(LoadFailed, match=f"neither a folder, nor in {tmp_path}, nor one of builtin:emoji"):
                ENGINE.check(model(path))

    def test_a_folder_needs_mflux(self, tmp_path: Path) -> None:
        if importlib.util.find_spec("mflux"):
            pytest.skip("it is there")
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(str(tmp_path)))
        assert caught.value.message.endswith("mflux is not importable; mend: pip install 'mlxsup[mflux]'")

    def test_a_lora_must_be_there(self, tmp_path: Path, with_mflux: None) -> None:
        ENGINE.check(model(str(tmp_path), lora_paths=[__file__]))
        with pytest.raises(LoadFailed, match=r"no LoRA at /nowhere/lora: .* the key is lora_paths") as caught:
            ENGINE.check(model(str(tmp_path), lora_paths=[__file__, "/nowhere/lora"]))
        assert caught.value.permanent

    @pytest.mark.parametrize("keys", [{"quantize": 4}, {"lora_paths": [__file__]}])
    def test_what_ships_is_used_as_it_is(self, keys: dict[str, Any]) -> None:
        with pytest.raises(LoadFailed, match="builtin:emoji is used as it is") as caught:
            ENGINE.check(model(**keys))
        assert caught.value.permanent

    @pytest.mark.parametrize("path", ["", "builtin:none", "/nowhere/model", __file__])
    def test_a_path_that_is_no_model(self, path: str) -> None:
        with pytest.raises(LoadFailed) as caught:
            ENGINE.check(model(path, memory="1GiB"))
        assert caught.value.permanent
        assert (path or "(no path)") in caught.value.message
        assert "builtin:emoji" in caught.value.message

    def test_it_does_not_load_mlx_into_this_process(self) -> None:
        code = (
            "import sys\n"
            "from mlxsup.config import built_in\n"
            "from mlxsup.engines import ENGINES, KEYS\n"
            "ENGINES['imagegen'].check(built_in(KEYS).models['emoji'])\n"
            "print([name for name in sys.modules if name.startswith('mlx.') or name == 'PIL.Image'])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestPlatform:
    @pytest.mark.parametrize("machine", ["x86_64", "i386"])
    def test_a_mac_without_apple_silicon(self, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model())
        assert "arm64" in caught.value.message
        assert machine in caught.value.message
        assert caught.value.permanent

    def test_a_mac_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        ENGINE.check(model())

    @pytest.mark.parametrize("missing", ["mlx", "PIL"])
    def test_without_mlx(self, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(missing) else object())
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model())
        assert missing in caught.value.message
        assert "pip install 'mlxsup[imagegen]'" in caught.value.message
        assert caught.value.permanent
        assert caught.value.details["cause"] == "missing_library"

    def test_without_the_package_above_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> object:
            raise ModuleNotFoundError(f"No module named {name!r}")

        monkeypatch.setattr(importlib.util, "find_spec", missing)
        with pytest.raises(EngineUnavailable, match="mlx is not importable"):
            ENGINE.check(model())


class TestAnotherInterpreter:
    def test_with_all_it_needs(self, tmp_path: Path) -> None:
        if not importlib.util.find_spec("mlx"):
            pytest.skip("needs the extra imagegen")
        ENGINE.check(model(python=interpreter(tmp_path, "mlx", "PIL", "mlxsup")))

    @pytest.mark.parametrize("missing", ["mlx", "PIL", "mlxsup"])
    def test_without_something(self, tmp_path: Path, missing: str) -> None:
        """Its runner is a part of this package, so that must be there as well."""
        there = interpreter(tmp_path, *{"mlx", "PIL", "mlxsup"} - {missing})
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(python=there))
        assert f"{missing} is not importable" in caught.value.message
        assert there in caught.value.message, "it does not say where"

    def test_that_is_not_there(self) -> None:
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(python="/nowhere/bin/python"))
        assert "/nowhere/bin/python" in caught.value.message
        assert caught.value.permanent

    def test_that_is_no_interpreter(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("hello")
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(python=str(text)))
        assert str(text) in caught.value.message


class TestLaunch:
    def test_on_a_socket(self) -> None:
        launch = ENGINE.launch(model(), Address(socket="/run/x/1.sock"))
        assert launch.argv == (
            *(sys.executable, "-P", "-m", "mlxsup.imagegen", "--imagegen-engine", "--model", "builtin:emoji"),
            *("--socket", "/run/x/1.sock", "--ready-fd", Launch.READY_FD),
        )
        assert launch.wants_ready_fd

    def test_on_a_port(self) -> None:
        argv = ENGINE.launch(model(), Address(port=4711)).argv
        assert argv[argv.index("--port") + 1] == "4711"
        assert "--socket" not in argv

    def test_it_prefers_a_socket(self) -> None:
        assert ENGINE.transport(model()) == "unix"

    def test_in_another_interpreter(self) -> None:
        assert ENGINE.launch(model(python="/opt/venv/bin/python"), Address(port=1)).argv[0] == "/opt/venv/bin/python"

    def test_the_weights_are_adapted_as_configured(self) -> None:
        argv = ENGINE.launch(
            model("/m", quantize=4, lora_paths=["/a b", "-c"], lora_scales=[0.5, -1.0]), Address(port=1)
        ).argv
        assert [part for part in argv if part.startswith(("--quantize", "--lora"))] == [
            *("--quantize=4", "--lora=/a b", "--lora=-c"),
            *("--lora-scale=0.5", "--lora-scale=-1.0"),
        ]

    @pytest.mark.parametrize(
        ("path", "keys", "expected"),
        [
            ("builtin:emoji", {}, []),
            ("builtin:emoji", {"max_pixels": 4096}, ["--max-pixels=4096"]),
            ("/m", {}, ["--max-pixels=1048576"]),
            ("/m", {"max_pixels": 512 * 512}, ["--max-pixels=262144"]),
        ],
    )
    def test_the_runner_is_told_what_is_reserved(self, path: str, keys: dict[str, Any], expected: list[str]) -> None:
        argv = ENGINE.launch(model(path, **keys), Address(port=1)).argv
        assert [part for part in argv if part.startswith("--max-pixels")] == expected

    def test_odd_paths_stay_one_argument(self) -> None:
        argv = ENGINE.launch(model("/models/a b; rm -rf $HOME"), Address(port=1)).argv
        assert argv[argv.index("--model") + 1] == "/models/a b; rm -rf $HOME"

    @pytest.mark.skipif(sys.platform != "linux", reason="MLX on the CPU")
    def test_on_linux_without_the_compiler_and_with_openblas_if_there_is_one(self) -> None:
        env = ENGINE.launch(model(), Address(port=1)).env
        assert env["MLX_DISABLE_COMPILE"] == "1"
        assert all(Path(path).exists() for path in filter(None, env.get("LD_PRELOAD", "").split(os.pathsep)))

    def test_on_a_mac_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        imagegen_module._cpu_environment.cache_clear()
        try:
            assert ENGINE.launch(model(), Address(port=1)).env == {}
        finally:
            imagegen_module._cpu_environment.cache_clear()

    def test_mlx_libraries_come_first_the_base_before_its_back_ends(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("lib", "lib/mlx_cuda", "lib/mlx_cpu", "lib/cmake"):
            (tmp_path / name).mkdir()

        class Spec:
            submodule_search_locations = (str(tmp_path), "/nowhere/mlx")

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
        found = ENGINE.launch(model(), Address(port=1)).library_dirs
        assert found == tuple(str(tmp_path / name) for name in ("lib", "lib/mlx_cpu", "lib/mlx_cuda"))


class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"quantize": 7}, "models.pic.quantize: expected 3 or 4 or 5 or 6 or 8, not 7"),
            ({"quantize": 1 << 20_000}, "models.pic.quantize: a number of more than 64 bits"),
            ({"lora_scales": [1.0]}, "models.pic: lora_scales has 1 for 0 lora_paths: one each, or none"),
            ({"lora_paths": ["/a", "/b"], "lora_scales": [1.0]}, "lora_scales has 1 for 2 lora_paths"),
        ],
    )
    def test_what_makes_no_sense_is_a_config_error(self, keys: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            model("/m", **keys)
        assert words in caught.value.message

    def test_home_is_filled_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        argv = ENGINE.launch(model("/m", lora_paths=["~/style"]), Address(port=1)).argv
        assert "--lora=/home/me/style" in argv


class TestWeigh:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A pipeline with 1,024,000 numbers of 16 bits in its transformer, and 512,000 in its autoencoder."""
        for name, rows in (("transformer", 1000), ("vae", 500)):
            write(tmp_path / name / "0.safetensors", "BF16", (rows, 1024))
        return tmp_path

    def test_as_stored(self, folder: Path) -> None:
        assert ENGINE.weigh(model(str(folder))).tensor_bytes == 3 * 1_024_000

    @pytest.mark.parametrize(("bits", "expected"), [(4, 1_024_000 + 576_000), (8, 1_024_000 + 1_088_000)])
    def test_quantised_all_but_the_autoencoder_shrinks(self, folder: Path, bits: int, expected: int) -> None:
        found = ENGINE.weigh(model(str(folder), quantize=bits))
        assert found.tensor_bytes == expected == sum(file.bytes for file in found.files)
        assert found.quantisation == f"{bits}-bit"
        assert ENGINE.need(model(str(folder), quantize=bits)).tensors == expected

    def test_what_is_stored_quantised_stays(self, folder: Path) -> None:
        path = folder / "transformer/0.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"BF16", "shape": [1000, 1024]', b'"U32", "shape": [1000,  512] '))
        assert ENGINE.weigh(model(str(folder), quantize=4)).tensor_bytes == 3 * 1_024_000


class TestLoras:
    @staticmethod
    def lora(folder: Path, rows: int) -> str:
        write(folder / "style.safetensors", "F16", (rows, 512))
        return str(folder / "style.safetensors")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A pipeline with 40 MiB of 16 bits in its transformer, and 2 MiB in its autoencoder."""
        write(tmp_path / "pipeline/transformer/0.safetensors", "BF16", (20_480, 1024))
        write(tmp_path / "pipeline/vae/0.safetensors", "BF16", (1024, 1024))
        return tmp_path / "pipeline"

    def test_their_files_count(self, folder: Path, tmp_path: Path) -> None:
        plain = ENGINE.weigh(model(str(folder), quantize=4))
        found = ENGINE.weigh(model(str(folder), quantize=4, lora_paths=2 * [self.lora(tmp_path, 1024)]))
        assert found.tensor_bytes == plain.tensor_bytes + (2 << 20) == sum(file.bytes for file in found.files)
        assert found.tensors == plain.tensors + 2

    def test_another_lora_in_the_same_place_is_another_model(self, folder: Path, tmp_path: Path) -> None:
        learnt = Learnt(tmp_path)
        keys = []
        for rows in (1024, 2048):
            settings = model(str(folder), lora_paths=[self.lora(tmp_path, rows)])
            keys.append(reckon(settings, learnt).key)
        assert keys[0] != keys[1]

    def test_one_that_cannot_be_read_is_named(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "style.safetensors").write_bytes(b"\xff" * 20)
        with pytest.raises(LoadFailed, match=r"style\.safetensors: no safetensors") as caught:
            ENGINE.need(model(str(folder), lora_paths=[str(tmp_path / "style.safetensors")]))
        assert caught.value.message.endswith("; or say what it needs: models.pic.memory")

    def test_while_they_are_folded_in_the_transformer_is_held_as_it_is_stored(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """That is before any picture is made, so the larger of the two counts."""
        small, lora = {"quantize": 4, "max_pixels": 64 * 64}, self.lora(tmp_path, 1024)
        picture = ENGINE.need(model(str(folder), **small)).working_set
        assert picture < 40 << 20
        assert ENGINE.need(model(str(folder), **small, lora_paths=[lora])).working_set == 40 << 20
        usual = ENGINE.need(model(str(folder), lora_paths=[lora])).working_set
        assert usual == ENGINE.need(model(str(folder))).working_set > 40 << 20

    def test_what_is_stored_in_few_bits_stays_larger(self, folder: Path, tmp_path: Path) -> None:
        write(folder / "transformer/0.safetensors", "U32", (10_240, 1024))
        plain = ENGINE.need(model(str(folder))).working_set
        assert ENGINE.need(model(str(folder), lora_paths=[self.lora(tmp_path, 1024)])).working_set == plain + (40 << 20)


class TestAbilities:
    def test_pictures_only(self) -> None:
        ENGINE.require("completion")
        for ability in ("embedding", "tokenize", "detokenize"):
            with pytest.raises(NotSupported) as caught:
                ENGINE.require(ability)
            assert caught.value.status == 501
            assert ability in caught.value.message

    def test_sampling_of_text_means_nothing_to_it(self) -> None:
        request = CompletionRequest(prompt="p", width=64, options=Options(top_k=3, stop=["x"]))
        assert ENGINE.unsupported(request) == ["options.top_k", "options.stop"]

    def test_what_pictures_need_does(self) -> None:
        request = CompletionRequest(
            prompt="p", negative_prompt="n", guidance=2.0, width=64, height=64, steps=4, seed=1, images=[b"x"]
        )
        assert ENGINE.unsupported(request) == []
        assert ENGINE.unsupported(CompletionRequest(prompt="p", options=Options())) == []
