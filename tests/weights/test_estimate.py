"""`mlxsup estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclopts import App

from mlxsup.cli.estimate import estimate
from mlxsup.errors import InvalidRequest, ModelNotFound
from mlxsup.weights import UnreadableModel

from .making import gguf, layer, manifest, number, safetensors, tensor, write
from .test_folders import flux
from .test_safetensors import sharded


@pytest.fixture(autouse=True)
def _stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def run(*words: str) -> int:
    """Run the verb as the command line would."""
    app = App(result_action="return_value", exit_on_error=False, print_error=False)
    app.command(estimate, name="estimate")
    code = app(["estimate", *words])
    assert isinstance(code, int)
    return code


def test_it_prints_bytes_by_file_and_the_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(sharded(tmp_path / "m"))) == 0

    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/m: safetensors, BF16, 6 tensors, 96 parameters",
        "        32 B  model-00001-of-00003.safetensors",
        "        64 B  model-00002-of-00003.safetensors",
        "        96 B  model-00003-of-00003.safetensors",
        "need 256.0 MiB: 192 B tensors + 38 B working set + 256.0 MiB margin",
    ]


def test_a_pipeline_needs_more_for_larger_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux(tmp_path / "m")
    run(str(tmp_path / "m"))
    assert "9.5 GiB working set" in capsys.readouterr().out
    run(str(tmp_path / "m"), "--size", "512x512")
    out = capsys.readouterr().out
    assert "2.4 GiB working set" in out
    assert "  transformer/diffusion_pytorch_model-00001-of-00002.safetensors" in out


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", gguf([number("general.file_type", 15)], [tensor("a", [8])], 32))

    run(str(path), "--json")

    found = json.loads(capsys.readouterr().out)
    assert found["weights"]["files"] == [{"path": str(path), "bytes": 32}]
    assert found["weights"]["quantisation"] == "Q4_K_M"
    assert found["need"]["total"] == 32 + 6 + 256 * 1024**2
    assert found["need"]["source"] == "estimated"


def test_names_are_those_of_the_configuration_and_then_of_the_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "ollama"
    weights = layer(store, gguf([], [tensor("a", [8])], 32))
    write(store / "manifests/models.example/library/mine/latest", manifest(weights))
    one = write(tmp_path / "one.safetensors", safetensors({"w": ("BF16", [8])}))
    config = write(
        tmp_path / "config.toml",
        f'[models.one]\nengine = "command"\ncommand = ["x"]\npath = "{one}"\naliases = ["uno"]\n'
        '[models.none]\nengine = "command"\ncommand = ["x"]\nmemory = "3GiB"\n',
    )

    run("uno", "--config", str(config))
    assert capsys.readouterr().out.startswith(f"{one}: ")
    run("mine", "--config", str(config))
    assert "  sha256-" in capsys.readouterr().out
    run("none", "--config", str(config))
    assert capsys.readouterr().out.splitlines()[-1] == "need 3.0 GiB: declared"


def test_the_models_that_ship_are_measured_too(capsys: pytest.CaptureFixture[str]) -> None:
    run("builtin:emoji")
    assert "emoji.safetensors" in capsys.readouterr().out
    run("emoji")
    assert "emoji.safetensors" in capsys.readouterr().out


def test_hundreds_of_files_are_not_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one in range(100):
        write(tmp_path / f"m/weights.{one:03}.safetensors", safetensors({"w": ("BF16", [8])}))
    run(str(tmp_path / "m"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 40 + 1 + 1
    assert lines[-2].split() == ["960", "B", "in", "60", "more", "files"]


def test_what_cannot_be_measured_is_the_error_of_measuring(tmp_path: Path) -> None:
    with pytest.raises(UnreadableModel, match="no such file"):
        run(str(tmp_path / "nothing"))
    with pytest.raises(UnreadableModel, match="nor a model of the Ollama store"):
        run("nobody")
    with pytest.raises(InvalidRequest, match="--size"):
        run(str(tmp_path), "--size", "big")


def test_a_slash_in_a_name_is_no_path_unless_one_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "org/m/one.safetensors", safetensors({"w": ("BF16", [8])}))
    config = write(tmp_path / "config.toml", '[models."org/m"]\nengine = "command"\ncommand = ["x"]\nmemory = "3GiB"\n')

    run("org/m", "--config", str(config))
    assert capsys.readouterr().out.splitlines()[-1] == "need 3.0 GiB: declared"
    with pytest.MonkeyPatch.context() as there:
        there.chdir(tmp_path)
        run("org/m", "--config", str(config))
    assert one.name in capsys.readouterr().out
    with pytest.raises(UnreadableModel, match="no such file"):
        run("./org/m", "--config", str(config))


def test_the_size_of_a_picture_counts_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write(tmp_path / "one.safetensors", safetensors({"w": ("BF16", [8])}))
    config = write(tmp_path / "config.toml", '[models.pic]\nengine = "imagegen"\npath = "builtin:emoji"\n')

    run("builtin:emoji", "--size", "1024x1024")
    assert "12.0 MiB working set" in capsys.readouterr().out
    with pytest.raises(InvalidRequest, match=r"--size: .* models\.pic\.max_pixels"):
        run("pic", "--size", "64x64", "--config", str(config))
    with pytest.raises(InvalidRequest, match=r"--size: .* makes no pictures"):
        run(str(plain), "--size", "64x64")


def test_of_models_that_ship_the_names_are_told() -> None:
    with pytest.raises(ModelNotFound, match="builtin:nope; there is builtin:emoji"):
        run("builtin:nope")


def test_what_is_declared_is_told_although_the_files_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m/pytorch_model.bin", b"x")
    config = write(
        tmp_path / "config.toml",
        f'[models.bin]\nengine = "command"\ncommand = ["x"]\npath = "{tmp_path}/m"\nmemory = "3GiB"\n'
        f'[models.unsaid]\nengine = "command"\ncommand = ["x"]\npath = "{tmp_path}/m"\n',
    )
    why = f"{tmp_path}/m: holds no .safetensors and no .gguf files; PyTorch's .bin files are not read"

    assert run("bin", "--config", str(config)) == 0
    assert capsys.readouterr().out.splitlines() == [f"bin: files not read: {why}", "need 3.0 GiB: declared"]
    run("bin", "--config", str(config), "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["unread"], found["need"]["total"]) == (None, why, 3 * 1024**3)
    with pytest.raises(UnreadableModel) as caught:
        run("unsaid", "--config", str(config))
    assert caught.value.message == f"{why}; or say what it needs: models.unsaid.memory"
