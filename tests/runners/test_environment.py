"""What a runner gets of our environment: what is on the list, what it is given, and nothing else."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from mlxsup.engines import Launch
from mlxsup.errors import LoadFailed
from mlxsup.runners import environment
from mlxsup.runners.environment import LIBRARY_PATH, build

from .children import model

OURS = {"PATH": "/bin", "SECRET_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "x", "MLXSUP_API_KEY": "k"}


def built(ours: dict[str, str] | None = None, launch: Launch | None = None, **keys: Any) -> dict[str, str]:
    return build(model(**keys), launch or Launch(argv=("x",)), OURS if ours is None else ours)


class TestPassedOn:
    @pytest.mark.parametrize(
        "name",
        [
            *("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"),
            *("HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "NVIDIA_DRIVER", "MLX_METAL_JIT", "METAL_DEVICE_WRAPPER_TYPE"),
            *("SSL_CERT_FILE", "SSL_CERT_DIR", "HUGGINGFACE_HUB_CACHE"),
        ],
    )
    def test_what_runners_need(self, name: str) -> None:
        assert built({name: "value"}) == {name: "value"}

    @pytest.mark.parametrize(
        "name",
        [
            *("SECRET_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HF_TOKEN", "MLXSUP_API_KEY", "MLXSUP_RUNNER"),
            *("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "DYLD_INSERT_LIBRARIES", "SSH_AUTH_SOCK", "NOTIFY_SOCKET"),
            *("LISTEN_FDS", "INVOCATION_ID", "path", "MY_PATH", "PATH_X", "LANGUAGE", "http_proxy"),
        ],
    )
    def test_nothing_else(self, name: str) -> None:
        assert built({name: "value"}) == {}

    def test_what_the_model_asks_for(self) -> None:
        assert built(pass_env=["SECRET_TOKEN"]) == {"PATH": "/bin", "SECRET_TOKEN": "s3cret"}

    def test_what_it_asks_for_and_is_not_set_is_not_set(self) -> None:
        assert built(pass_env=["NOT_SET"]) == {"PATH": "/bin"}

    def test_ours_is_used_where_none_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLX_OF_TEST", "value")
        monkeypatch.setenv("OTHER_OF_TEST", "value")
        found = build(model(), Launch(argv=("x",)))
        assert found["MLX_OF_TEST"] == "value"
        assert "OTHER_OF_TEST" not in found


class TestSet:
    def test_the_model_goes_before_the_engine_and_that_before_what_is_passed_on(self) -> None:
        ours = {"MLX_A": "ours", "MLX_B": "ours", "MLX_C": "ours"}
        launch = Launch(argv=("x",), env={"MLX_B": "engine", "MLX_C": "engine"})
        assert built(ours, launch, env={"MLX_C": "model"}) == {"MLX_A": "ours", "MLX_B": "engine", "MLX_C": "model"}

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("plain", "plain"),
            ("", ""),
            ("${SECRET_TOKEN}", "s3cret"),
            ("a ${PATH}:${SECRET_TOKEN} b", "a /bin:s3cret b"),
            ("$PATH", "$PATH"),
            ("$$", "$$"),
            ("~/x", "~/x"),
            ("`id` $(id)", "`id` $(id)"),
        ],
    )
    def test_variables_are_filled_in(self, value: str, expected: str) -> None:
        assert built(env={"KEY": value})["KEY"] == expected

    def test_what_is_filled_in_is_not_read_again(self) -> None:
        assert built({"A": "${B}", "B": "no"}, env={"KEY": "${A}"})["KEY"] == "${B}"

    def test_one_that_is_not_set_is_an_error_that_names_it(self) -> None:
        with pytest.raises(LoadFailed) as caught:
            built(env={"KEY": "x${NOT_SET}"})
        assert "models.m.env.KEY" in caught.value.message
        assert "${NOT_SET}" in caught.value.message
        assert caught.value.permanent


class TestLibraryPath:
    def libraries(self, ours: dict[str, str], *folders: str, **keys: Any) -> str | None:
        return built(ours, Launch(argv=("x",), library_dirs=folders), **keys).get(LIBRARY_PATH)

    def test_it_is_the_one_of_this_system(self) -> None:
        assert ("DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH") == LIBRARY_PATH

    def test_the_engines_folders_come_first_in_their_order(self) -> None:
        assert self.libraries({LIBRARY_PATH: "/ours:/more"}, "/mlx", "/mlx/mlx_cuda") == (
            "/mlx:/mlx/mlx_cuda:/ours:/more"
        )

    def test_without_an_existing_one(self) -> None:
        assert self.libraries({}, "/mlx") == "/mlx"
        assert self.libraries({LIBRARY_PATH: ""}, "/mlx") == "/mlx"

    def test_an_empty_entry_would_be_the_working_folder(self) -> None:
        assert self.libraries({LIBRARY_PATH: "/ours::/more:"}, "/mlx") == "/mlx:/ours:/more"

    def test_none_is_named_twice(self) -> None:
        assert self.libraries({LIBRARY_PATH: "/ours:/mlx"}, "/mlx") == "/mlx:/ours"

    def test_the_models_own_is_an_existing_one(self) -> None:
        assert self.libraries({LIBRARY_PATH: "/ours"}, "/mlx", env={LIBRARY_PATH: "/model"}) == "/mlx:/model"

    def test_without_folders_it_stays_as_it_is(self) -> None:
        assert self.libraries({LIBRARY_PATH: "/ours::"}) == "/ours::"
        assert self.libraries({}) is None

    def test_on_a_mac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environment, "LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        found = built({"DYLD_LIBRARY_PATH": "/ours"}, Launch(argv=("x",), library_dirs=("/mlx",)))
        assert found == {"DYLD_LIBRARY_PATH": "/mlx:/ours"}
