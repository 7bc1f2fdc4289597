"""Pipelines, cached repositories and other folders, and what a file system can do to a reader."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mlxsup.weights import default_cache, measure

from .complaints import complaint, measured_or_refused
from .making import gguf, safetensors, tensor, write

FLUX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "force_zeros_for_empty_prompt": True,
}


def flux(folder: Path) -> Path:
    """Write a diffusers pipeline of three components with weights."""
    write(folder / "model_index.json", FLUX)
    write(folder / "scheduler/scheduler_config.json", {})
    write(folder / "tokenizer/vocab.json", {})
    write(folder / "text_encoder/model.safetensors", safetensors({"w": ("BF16", [10])}))
    write(folder / "text_encoder/model.fp16.safetensors", safetensors({"w": ("F16", [10])}))
    write(folder / "vae/diffusion_pytorch_model.safetensors", safetensors({"w": ("F32", [10])}))
    names = [f"diffusion_pytorch_model-0000{one}-of-00002.safetensors" for one in (1, 2)]
    for one, name in enumerate(names):
        write(folder / "transformer" / name, safetensors({f"w{one}": ("BF16", [100])}))
    placed = {f"w{one}": name for one, name in enumerate(names)}
    write(folder / "transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": placed})
    write(folder / "flux1-dev.safetensors", safetensors({"everything": ("F32", [1000])}))
    return folder


def test_a_pipeline_is_its_components(tmp_path: Path) -> None:
    found = measure(flux(tmp_path))

    assert found.format == "pipeline"
    assert [str(Path(file.path).relative_to(tmp_path)) for file in found.files] == [
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert (found.tensor_bytes, found.parameters) == (20 + 400 + 40, 220)
    assert found.dtypes == {"BF16": 420, "F32": 40}


def test_a_component_without_weights_is_an_error_and_one_that_needs_none_is_not(tmp_path: Path) -> None:
    flux(tmp_path)
    (tmp_path / "tokenizer/vocab.json").unlink()
    (tmp_path / "tokenizer").rmdir()
    assert measure(tmp_path).tensors == 4

    (tmp_path / "vae/diffusion_pytorch_model.safetensors").rename(tmp_path / "vae/diffusion_pytorch_model.bin")
    assert "no .safetensors in it, but model_index.json names it: AutoencoderKL" in complaint(
        tmp_path, about=tmp_path / "vae"
    )
    (tmp_path / "vae").rename(tmp_path / "other")
    assert "not there, but model_index.json names it" in complaint(tmp_path, about=tmp_path / "vae")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "not JSON"),
        ("[]", "Expected `object`"),
        ('{"vae": ["d", "A"], "vae": ["d", "A"]}', "twice"),
        ('{"_class_name": "X", "a": true}', "names no component that has weights"),
        ('{"../elsewhere": ["d", "AModel"]}', "no folder in its own"),
        ('{"": ["d", "AModel"]}', "no folder in its own"),
        ('{"a":' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_pipeline_index_that_cannot_be_followed_is_an_error(tmp_path: Path, index: str, why: str) -> None:
    path = write(flux(tmp_path) / "model_index.json", index)

    assert why in complaint(tmp_path, about=path)


def test_components_without_an_index_count_whole(tmp_path: Path) -> None:
    for part in ("transformer/0", "transformer/1", "vae/0", "text_encoder/0"):
        write(tmp_path / f"{part}.safetensors", safetensors({"w": ("U32", [10])}))
    (tmp_path / "tokenizer").mkdir()

    found = measure(tmp_path)

    assert (found.format, found.tensor_bytes, len(found.files)) == ("pipeline", 160, 4)


def test_a_folder_without_weights_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    assert complaint(tmp_path) == "holds no .safetensors and no .gguf files"
    write(tmp_path / "pytorch_model.bin", b"x")
    assert complaint(tmp_path) == "holds no .safetensors and no .gguf files; PyTorch's .bin files are not read"


# A Hugging Face cache


def cached(cache: Path, name: str = "models--org--name", *, commit: str = "0a1b", branch: str = "main") -> Path:
    """Write a repository as the cache has it: refs, blobs, and a snapshot of links."""
    repository = cache / name
    content = safetensors({"w": ("BF16", [8])})
    write(repository / "blobs/5678", content)
    write(repository / "refs" / branch, commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/5678")
    return snapshot


def test_a_repository_is_found_by_name_revision_and_path(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    cached(tmp_path, commit="ffff", branch="old")
    other = cached(tmp_path, "models--gpt2", commit="1234", branch="elsewhere")

    for path in ("org/name", "org/name@main", "org/name@0a1b", tmp_path / "models--org--name", snapshot):
        found = measure(path, hf_cache=tmp_path)
        assert (found.path, found.tensor_bytes) == (str(snapshot), 16)
    assert measure("org/name@old", hf_cache=tmp_path).path.endswith("/ffff")
    assert measure("gpt2", hf_cache=tmp_path).path == str(other)


def test_a_revision_that_is_not_in_the_cache_is_an_error(tmp_path: Path) -> None:
    repository = cached(tmp_path).parents[1]
    cached(tmp_path, commit="ffff", branch="old")
    assert "no revision 'new' in the cache; there: main, old, 0a1b, ffff" in complaint(
        "org/name@new", about=repository, cache=tmp_path
    )

    write(repository / "refs/main", "gone")
    assert "names the snapshot 'gone'" in complaint("org/name", about=repository / "refs/main", cache=tmp_path)
    write(repository / "refs/main", b"\xff")
    assert "not UTF-8" in complaint("org/name", about=repository / "refs/main", cache=tmp_path)
    write(repository / "refs/main", b"x" * 5000)
    assert "where at most" in complaint("org/name", about=repository / "refs/main", cache=tmp_path)
    (repository / "refs/main").unlink()
    assert "no revision 'main'" in complaint("org/name", about=repository, cache=tmp_path)
    (tmp_path / "models--org--empty/snapshots").mkdir(parents=True)
    assert "no snapshot in it" in complaint("org/empty", about=tmp_path / "models--org--empty", cache=tmp_path)


def test_a_snapshot_whose_blob_is_gone_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (tmp_path / "models--org--name/blobs/5678").unlink()

    assert "No such file" in complaint("org/name", about=snapshot / "model.safetensors", cache=tmp_path)


def test_the_cache_is_where_hugging_face_has_it() -> None:
    home = str(Path("~").expanduser())
    assert default_cache({}) == f"{home}/.cache/huggingface/hub"
    assert default_cache({"XDG_CACHE_HOME": "/c"}) == "/c/huggingface/hub"
    assert default_cache({"HF_HOME": "/h", "XDG_CACHE_HOME": "/c"}) == "/h/hub"
    assert default_cache({"HF_HUB_CACHE": "/hub", "HF_HOME": "/h"}) == "/hub"
    assert default_cache({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}) == "/old"
    assert default_cache({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/hub"}) == "/hub"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("$DISK/hub", "/disk/hub"),
        ("${DISK}/hub", "/disk/hub"),
        ("~/hub", "/me/hub"),
        ("~", "/me"),
        ("/a/~/$DISKS/${NOT_SET}/$", "/a/~/$DISKS/${NOT_SET}/$"),
        ("/$LOOP", "/$DISK"),
        ("~nobody-of-that-name/hub", "~nobody-of-that-name/hub"),
    ],
)
def test_what_names_the_cache_is_filled_in_as_hugging_face_does(value: str, expected: str) -> None:
    environ = {"DISK": "/disk", "HOME": "/me", "LOOP": "$DISK"}
    assert default_cache({**environ, "HF_HUB_CACHE": value}) == expected
    assert default_cache({**environ, "HF_HOME": value}) == f"{expected}/hub"


# Names


def test_a_name_of_two_models_is_an_error(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    manifest = write(tmp_path / "manifests/models.example/org/name/latest", {"layers": []})

    said = complaint("org/name", store=tmp_path, cache=tmp_path)

    assert said == f"both {manifest} and {snapshot}; give the path of the one that is meant"


def test_what_is_nowhere_is_an_error_that_says_where_was_looked(tmp_path: Path) -> None:
    assert complaint("nowhere") == "no such file or folder"
    assert complaint("./nowhere", store=tmp_path) == "no such file or folder"
    assert complaint("nowhere.gguf", store=tmp_path) == "no such file or folder"
    said = complaint("no/where", store=tmp_path, cache=tmp_path / "hub")
    assert (
        said
        == f"neither a file or folder nor a model of the Ollama store {tmp_path} nor a model of the cache {tmp_path}/hub"
    )
    with pytest.raises(Exception, match="no such file") as caught:
        measure("nowhere")
    assert getattr(caught.value, "details", {})["cause"] == "missing_file"


def test_the_user_s_home_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "m.safetensors", safetensors({"w": ("BF16", [8])}))

    assert measure("~/m.safetensors").tensor_bytes == 16


# What a file system can do


def test_content_tells_the_format_where_the_name_does_not(tmp_path: Path) -> None:
    assert measure(write(tmp_path / "sha256-1", gguf([], [tensor("a", [8])], 32))).format == "gguf"
    assert measure(write(tmp_path / "sha256-2", safetensors({"w": ("BF16", [8])}))).format == "safetensors"
    assert complaint(write(tmp_path / "notes.txt", b"hello")) == "neither safetensors nor GGUF"
    assert complaint(write(tmp_path / "notes.json", {}), store=tmp_path / "store") == "neither safetensors nor GGUF"
    assert complaint(write(tmp_path / "empty", b"")) == "neither safetensors nor GGUF"


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/transformer").symlink_to("../m", target_is_directory=True)

    assert "Too many levels of symbolic links" in complaint(tmp_path / "a.safetensors")
    assert "Too many levels of symbolic links" in complaint(tmp_path, about=tmp_path / "a.safetensors")
    assert "holds no .safetensors" in complaint(tmp_path / "m")


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.gguf"])
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)

    assert complaint(tmp_path / name) == "not a regular file"
    assert complaint(tmp_path, about=tmp_path / name) == "not a regular file"
    assert complaint("/dev/zero") == "not a regular file"


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index/model.safetensors.index.json").mkdir(parents=True)
    (tmp_path / "config/config.json").mkdir(parents=True)
    write(tmp_path / "config/model.safetensors", safetensors({"w": ("BF16", [8])}))

    assert "holds no" in complaint(tmp_path / "index")
    assert measure(tmp_path / "config").tensors == 1


def test_what_may_not_be_read_is_an_error() -> None:
    nobody = AsNobody()
    with TemporaryDirectory(dir="/tmp") as name:  # pytest's folders are closed to others altogether
        place = Path(name)
        path = write(place / "m/model.safetensors", safetensors({"w": ("BF16", [8])}))
        path.chmod(0)
        place.chmod(0o755)
        with nobody:
            assert complaint(path) == "cannot be read: Permission denied"
            assert complaint(path.parent, about=path) == "cannot be read: Permission denied"
        path.parent.chmod(0)
        with nobody:
            assert complaint(path) == "cannot be read: Permission denied"
            assert complaint(path.parent) == "cannot be read: Permission denied"
        path.parent.chmod(0o700)


class AsNobody:
    """Be a user who may not read everything, where the tests are run by root."""

    def __enter__(self) -> None:
        if os.getuid() == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(os.getuid())


def test_names_that_are_no_text_are_shown_all_the_same(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    Path(path).write_bytes(safetensors({"w": ("BF16", [8])}))

    assert measure(path).path == f"{tmp_path}/?.safetensors"
    assert measure(tmp_path).files[0].path == f"{tmp_path}/?.safetensors"
    for name in ("\0", "a\0b.safetensors", "/\0", "\ud800", "/tmp/\ud800", 5000 * "x", f"/{5000 * 'x'}"):
        complaint(name, about=name.encode(errors="replace").decode())


@pytest.mark.slow
@pytest.mark.timeout(120)  # to make the files; a busy disk takes its time
def test_a_folder_of_100_000_files_is_listed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory() as name:
        for number in range(100_000):
            os.mknod(f"{name}/{number}.txt")

        assert "holds no .safetensors" in str(measured_or_refused(Path(name)))

        monkeypatch.setattr("mlxsup.weights.reading.ENTRIES_LIMIT", 1000)
        assert "more than 1000 entries" in complaint(name)
