"""What a right configuration becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsup.config import VARIABLE, Duration, Listen, Size, built_in, parse, parse_listen
from mlxsup.engines import KEYS
from mlxsup.errors import ModelNotFound


def test_without_anything_there_is_emoji_and_the_defaults() -> None:
    settings = parse({}, KEYS)
    assert settings == built_in(KEYS)
    assert list(settings.models) == ["emoji"]
    assert settings.models["emoji"].engine == "imagegen"
    assert settings.models["emoji"].path == "builtin:emoji"
    assert settings.source == "built in"
    assert settings.server.listen == ["127.0.0.1:11435"]
    assert settings.server.max_body == 64 * 1024**2
    assert settings.scheduler.keep_alive == Duration(300)


def test_a_file_without_models_keeps_emoji() -> None:
    assert list(parse({"scheduler": {"queue": 3}}, KEYS).models) == ["emoji"]
    assert list(parse({"models": {}}, KEYS).models) == ["emoji"]


def test_a_file_with_models_has_those_alone() -> None:
    assert list(parse({"models": {"a": {"engine": "imagegen", "path": "a"}}}, KEYS).models) == ["a"]


def test_all_keys_of_a_model() -> None:
    settings = parse(
        {
            "server": {"listen": ["[::1]:80", "unix:/run/m.sock"], "max_body": "1GB"},
            "scheduler": {"keep_alive": -1, "load_timeout": 90, "queue": 7},
            "models": {
                "a": {
                    "engine": "command",
                    "command": ["serve", "{path}"],
                    "path": "/models/a",
                    "aliases": ["b", "gpt-4o-mini"],
                    "keep_alive": 0,
                    "load_timeout": "1h",
                    "drain_timeout": 0,
                    "concurrency": 4,
                    "env": {"TOKEN": "${TOKEN}", "PRICE": "$5"},
                    "pass_env": ["HF_TOKEN"],
                    "stop_signal": "SIGINT",
                    "health": "none",
                    "check_listener": False,
                }
            },
        },
        KEYS,
        "a.toml",
    )
    model = settings.models["a"]
    assert (model.name, model.keep_alive, model.load_timeout) == ("a", Duration(0), Duration("1h"))
    assert model.drain_timeout == Duration(0)
    assert isinstance(model.keep_alive, Duration)
    assert isinstance(settings.server.max_body, Size)
    assert (model.concurrency, model.stop_signal, model.health, model.check_listener) == (4, "SIGINT", "none", False)
    assert model.env == {"TOKEN": "${TOKEN}", "PRICE": "$5"}
    assert model.options == KEYS["command"](command=["serve", "{path}"])
    assert settings.scheduler.keep_alive == Duration(-1)
    assert settings.source == "a.toml"


def test_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/h")
    settings = parse(
        {
            "server": {"listen": ["unix:~/m.sock"]},
            "models": {"a": {"engine": "imagegen", "path": "~/models/a", "python": "~/venv/bin/python"}},
        },
        KEYS,
    )
    assert settings.server.listen == ["unix:/h/m.sock"]
    assert settings.models["a"].path == "/h/models/a"
    assert settings.models["a"].python == "/h/venv/bin/python"


def test_a_model_is_found_by_its_name_and_by_its_aliases() -> None:
    settings = parse({"models": {"a": {"engine": "imagegen", "path": "a", "aliases": ["b"]}}}, KEYS)
    assert settings.resolve("a") is settings.resolve("b") is settings.models["a"]


def test_an_unknown_model_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ModelNotFound, match="no model is named 'emojy', did you mean emoji") as caught:
        built_in(KEYS).resolve("emojy")
    assert caught.value.details == {"model": "emojy", "known": ["emoji"], "suggestion": "emoji"}


def test_an_unknown_model_without_a_close_name_is_refused_with_all_names() -> None:
    with pytest.raises(ModelNotFound, match="no model is named 'x'; known: emoji") as caught:
        built_in(KEYS).resolve("x")
    assert caught.value.details == {"model": "x", "known": ["emoji"]}


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:11435", Listen(host="127.0.0.1", port=11435)),
        ("localhost:0", Listen(host="localhost", port=0)),
        ("[::1]:80", Listen(host="::1", port=80)),
        ("unix:/run/m.sock", Listen(path="/run/m.sock")),
    ],
)
def test_addresses_are_taken_apart(text: str, listen: Listen) -> None:
    assert parse_listen(text) == listen
    assert listen.kind == ("unix" if text.startswith("unix:") else "tcp")


def test_variables_in_values_have_one_spelling() -> None:
    assert VARIABLE.findall("${A}:${B_2}$C ${") == ["A", "B_2"]


def test_no_engine_takes_a_key_that_every_model_has() -> None:
    common = set(type(built_in(KEYS).models["emoji"]).__struct_fields__)
    assert {key for keys in KEYS.values() for key in keys.__struct_fields__} & common == set()
