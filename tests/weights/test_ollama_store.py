"""Models of an Ollama store, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxsup.weights import default_store, measure

from .complaints import complaint
from .making import blob, gguf, layer, manifest, number, safetensors, split_keys, tensor, write

MODEL = gguf([number("general.file_type", 15)], [tensor("a", [8]), tensor("b", [8], offset=32)], 64)
PROJECTOR = gguf([], [tensor("v", [16])], 64)
REGISTRY = "manifests/models.example"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


def put(store: Path, place: str, *layers: dict[str, object], **more: object) -> Path:
    """Write a manifest into the store."""
    return write(store / place, manifest(*layers, **more))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("llama3.2", f"{REGISTRY}/library/llama3.2/latest"),
        ("llama3.2:3b-q4_K_M", f"{REGISTRY}/library/llama3.2/3b-q4_K_M"),
        ("library/llama3.2:latest", f"{REGISTRY}/library/llama3.2/latest"),
        ("jane/mine:v1", f"{REGISTRY}/jane/mine/v1"),
        ("other.example:5000/jane/mine:v1", "manifests/other.example:5000/jane/mine/v1"),
        ("models.example/x/flux:4b", f"{REGISTRY}/x/flux/4b"),
        ("x/flux:4b", "manifests-v2/models.example/x/flux/4b"),
    ],
)
def test_a_name_leads_to_its_manifest(store: Path, name: str, place: str) -> None:
    path = put(store, place, layer(store, MODEL), layer(store, b"a template", "template"))

    found = measure(name, ollama_store=store)

    assert (found.path, found.format, found.tensor_bytes, found.quantisation) == (str(path), "gguf", 64, "Q4_K_M")
    assert measure(path, ollama_store=store) == found


def test_a_name_that_came_from_two_hosts_must_say_which(store: Path) -> None:
    put(store, "manifests/one.example/library/mine/latest", layer(store, MODEL))
    put(store, "manifests/two.example/library/mine/latest", layer(store, PROJECTOR))
    assert "from one.example and from two.example" in complaint("mine", about=store / "manifests", store=store)
    assert measure("one.example/library/mine", ollama_store=store).tensor_bytes == 64


def test_what_is_loaded_with_the_model_counts_and_a_shared_blob_once(store: Path) -> None:
    layers = [layer(store, MODEL), layer(store, PROJECTOR, "projector"), layer(store, PROJECTOR, "projector")]
    put(store, f"{REGISTRY}/library/seeing/latest", *layers)

    found = measure("seeing", ollama_store=store)

    assert (found.tensor_bytes, found.tensors, len(found.files)) == (128, 3, 2)


def test_models_in_tensor_layers_are_safetensors(store: Path) -> None:
    tensors = [
        layer(
            store, safetensors({f"layers.{one}.weight": ("BF16", [16, 1 + one])}), "tensor", name=f"layers.{one}.weight"
        )
        for one in range(3)
    ]
    packed = safetensors(
        {"w": ("U32", [4, 8]), "w.scale": ("BF16", [4, 1])}, {"quant_type": "int4", "group_size": "32"}
    )
    config = layer(store, b'{"max_position_embeddings": 4096}', "json", name="config.json")
    put(store, f"{REGISTRY}/library/mlx-one/latest", *tensors, layer(store, packed, "tensor", name="w"), config)

    found = measure("mlx-one", ollama_store=store)

    assert (found.format, found.tensor_bytes) == ("safetensors", 32 + 64 + 96 + 128 + 8)
    assert (found.tensors, found.parameters, found.context_length) == (5, None, 4096)


def test_tensor_layers_with_a_model_index_are_a_pipeline(store: Path) -> None:
    index = layer(store, b'{"_class_name": "ZImagePipeline"}', "json", name="model_index.json")
    weight = layer(store, safetensors({"data": ("BF16", [64])}), "tensor", name="vae/w", dtype="BF16", shape=[64])
    put(store, f"{REGISTRY}/x/z-image/latest", index, weight)

    assert measure("x/z-image", ollama_store=store).format == "pipeline"


def test_of_a_list_of_manifests_the_one_for_this_machine_counts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: dict[str, Any] = {**manifest(layer(store, safetensors({"w": ("F32", [100])}), "tensor")), "runner": "mlx"}
    child = blob(store, write(store / "child", manifest(layer(store, MODEL))).read_bytes())
    reference = {"mediaType": whole["mediaType"], "digest": child["digest"], "runner": "llamacpp"}
    path = write(store / "manifests-v2/models.example/library/two/latest", {
        "mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": [whole, reference]
    })  # fmt: skip

    assert measure("two", ollama_store=store).tensor_bytes == 64

    with monkeypatch.context() as mac:
        mac.setattr("sys.platform", "darwin")
        mac.setattr("platform.machine", lambda: "arm64")
        assert measure("two", ollama_store=store).tensor_bytes == 400

    write(path, {"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": []})
    assert "a list without a runner that is known: empty" in complaint("two", about=path, store=store)


def test_a_manifest_that_is_a_link_to_its_blob_is_followed_and_a_dead_one_is_none(store: Path) -> None:
    content = write(store / "x", manifest(layer(store, MODEL))).read_bytes()
    target = store / "blobs" / str(blob(store, content)["digest"]).replace(":", "-")
    link = store / "manifests-v2/models.example/library/linked/latest"
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert measure("linked", ollama_store=store).tensor_bytes == 64

    target.unlink()
    assert "neither a file or folder nor a model of the Ollama store" in complaint("linked", store=store)
    put(store, f"{REGISTRY}/library/linked/latest", layer(store, PROJECTOR))
    assert measure("linked", ollama_store=store).tensor_bytes == 64


DIGEST = "sha256:" + 64 * "0"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ("[]", "Expected `object`"),
        ('{"layers": 1}', "Expected `array | null`"),
        ('{"layers": []}', "lists no layer with weights"),
        ('{"layers": null}', "lists no layer with weights"),
        ('{"layers": [{"mediaType": "application/vnd.ollama.image.model", "size": 1}]}', "'' is no digest"),
        (
            '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}',
            "is no digest",
        ),
        ('{"layers": [], "layers": []}', "the key 'layers' is there twice"),
        ('{"layers": [{"mediaType": "application/vnd.ollama.image.model", "size": "1"}]}', "Expected `int`"),
        ('{"layers":' + "[" * 100_000, ""),
        ('{"x":' * 100_000, "nested too deeply"),
        ("\xff", "invalid character"),
        ('{"x": "\xff"}', "not UTF-8"),
        (" " * (33 * 1024**2), "where at most"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error_that_names_it(store: Path, content: str, why: str) -> None:
    path = write(store / REGISTRY / "library/bad/latest", content.encode("latin-1"))

    assert why in complaint("bad", about=path, store=store)


def test_a_blob_that_is_missing_or_cut_off_is_an_error_that_names_it(store: Path) -> None:
    described = layer(store, MODEL)
    put(store, f"{REGISTRY}/library/cut/latest", described)
    path = store / "blobs" / str(described["digest"]).replace(":", "-")

    path.write_bytes(MODEL[:-1])
    assert f"{len(MODEL) - 1} bytes, but" in complaint("cut", about=path, store=store)

    path.unlink()
    assert "No such file" in complaint("cut", about=path, store=store)


def test_a_blob_that_is_only_a_part_is_an_error(store: Path) -> None:
    described = layer(store, gguf(split_keys(0, 2, 2), [tensor("a", [8])], 32))
    put(store, f"{REGISTRY}/library/half/latest", described)
    path = store / "blobs" / str(described["digest"]).replace(":", "-")

    assert "only part 1 of 2 of a model" in complaint("half", about=path, store=store)


@pytest.mark.parametrize(
    "name",
    [
        "nobody",
        "a/b/c/d",
        "../x",
        "a..b",
        "x:",
        ":x",
        "x:y:z",
        "",
        "a b",
        "x@sha256:0",
        "-x",
        "x/../y",
        "\0",
        "x\n",
        "é",
        400 * "x",
    ],
)
def test_what_is_no_name_of_a_model_is_not_found(
    store: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(store, f"{REGISTRY}/library/somebody/latest", layer(store, MODEL))

    if name.startswith("../"):
        assert "no such file or folder" in complaint(name, store=store)
    else:
        assert "nor a model of the Ollama store" in complaint(name, store=store)


def test_the_store_is_where_ollama_has_it() -> None:
    assert default_store({"OLLAMA_MODELS": "/srv/models"}) == "/srv/models"
    assert default_store({}) == str(Path("~/.ollama/models").expanduser())
