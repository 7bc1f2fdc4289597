"""What all engines have in common: where they look for a model that is named, and what they say of its size."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsup.config import ModelSettings, parse
from mlxsup.engines import ENGINES, KEYS, Launch
from mlxsup.errors import LoadFailed
from mlxsup.runners.environment import build
from mlxsup.weights import UnreadableModel, default_cache

PLACES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS")


@pytest.fixture(autouse=True)
def nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def model(engine: str = "command", **keys: Any) -> ModelSettings:
    own = {"command": ["x"]} if engine == "command" else {}
    return parse({"models": {"m": {"engine": engine, "path": "org/pic", **own, **keys}}}, KEYS).models["m"]


def weigh(settings: ModelSettings) -> int:
    return ENGINES[settings.engine].weigh(settings).tensor_bytes


def cached(cache: Path) -> None:
    """Put org/pic into a Hugging Face cache: one tensor of 16 bytes in the transformer of a pipeline."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    component = cache / "models--org--pic/snapshots/0123/transformer"
    component.mkdir(parents=True)
    (component / "0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


class TestCache:
    @pytest.mark.parametrize("engine", ["command", "imagegen"])
    @pytest.mark.parametrize(
        ("env", "cache"),
        [
            ({"HF_HOME": "{}/mine"}, "mine/hub"),
            ({"HF_HUB_CACHE": "{}/mine"}, "mine"),
            ({"HUGGINGFACE_HUB_CACHE": "{}/mine"}, "mine"),
            ({"XDG_CACHE_HOME": "{}/mine", "HF_HOME": ""}, "mine/huggingface/hub"),
            ({"HF_HOME": "${{DISK_OF_TEST}}/mine"}, "disk/mine/hub"),
            ({"HF_HOME": "${{HF_HOME}}/mine", "HF_HUB_CACHE": ""}, "ours/mine/hub"),
            ({"DISK": "{}/disk", "HF_HOME": "$DISK"}, "disk/hub"),
            ({"HOME": "{}/other", "HF_HOME": "~/mine"}, "other/mine/hub"),
            ({"HF_HOME": "{}/mine", "TOKEN": "${{NOT_SET_IN_TESTS}}"}, "mine/hub"),
        ],
    )
    def test_it_is_the_one_of_the_models_runner(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, env: dict[str, str], cache: str
    ) -> None:
        monkeypatch.setenv("DISK_OF_TEST", str(tmp_path / "disk"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "ours"))
        cached(tmp_path / cache)
        settings = model(engine, env={name: value.format(tmp_path) for name, value in env.items()})

        assert weigh(settings) == 16
        if "TOKEN" not in env:
            assert default_cache(build(settings, Launch(argv=("x",)))) == str(tmp_path / cache)
        with pytest.raises(UnreadableModel, match="neither a file or folder nor a model of the Ollama store"):
            weigh(model(engine))

    def test_what_the_runner_does_not_get_says_nothing_of_its_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DISK_OF_TEST", str(tmp_path))
        monkeypatch.setenv("HF_HOME", "$DISK_OF_TEST/hf")
        cached(tmp_path / "hf/hub")

        assert weigh(model(pass_env=["DISK_OF_TEST"])) == 16
        with pytest.raises(UnreadableModel, match=r"the cache \$DISK_OF_TEST/hf/hub"):
            weigh(model())

    def test_a_variable_that_is_not_set_is_named_where_it_counts(self) -> None:
        settings = model(env={"HF_HOME": "${NOT_SET_IN_TESTS}/hf"})

        with pytest.raises(UnreadableModel, match=r"the cache \$\{NOT_SET_IN_TESTS\}/hf/hub"):
            weigh(settings)
        with pytest.raises(LoadFailed, match=r"models\.m\.env\.HF_HOME names \$\{NOT_SET_IN_TESTS\}"):
            build(settings, Launch(argv=("x",)))

    @pytest.mark.skipif(sys.platform == "darwin", reason="the engine looks at the machine first")
    def test_the_image_engine_refuses_what_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not importlib.util.find_spec("mlx"):
            pytest.skip("needs the extra imagegen")
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "mflux" else found(name))
        cached(tmp_path / "mine/hub")

        ENGINES["imagegen"].check(model("imagegen", env={"HF_HOME": str(tmp_path / "mine")}))
        with pytest.raises(LoadFailed, match=f"neither a folder, nor in {tmp_path}/empty/hub, nor one of"):
            ENGINES["imagegen"].check(model("imagegen", env={"HF_HOME": str(tmp_path / "empty")}))


def test_the_ollama_store_is_that_of_the_models_env_too(tmp_path: Path) -> None:
    settings = model(path="mine", env={"OLLAMA_MODELS": str(tmp_path / "store")})

    with pytest.raises(UnreadableModel, match=f"the Ollama store {tmp_path}/store"):
        weigh(settings)
