"""The example file, the schema and `config show` tell the truth."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from mlxsup.config import ModelSettings, Settings, built_in, example, parse, schema, show
from mlxsup.engines import KEYS
from mlxsup.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"


def uncommented(text: str) -> str:
    """Switch every key and table on that stands in a comment."""
    return re.sub(r"(?m)^# ((\[models\.[a-z]+\]$)|([a-z_]+ = ))", r"\1", text)


def test_the_file_in_the_repository_is_what_the_code_makes() -> None:
    assert EXAMPLE.read_text() == example(KEYS), "run: make example"


def test_the_example_as_it_stands_changes_nothing() -> None:
    assert parse(tomllib.loads(example(KEYS)), KEYS) == built_in(KEYS)


def test_the_example_with_all_keys_switched_on_can_be_read() -> None:
    settings = parse(tomllib.loads(uncommented(example(KEYS))), KEYS)
    assert list(settings.models) == ["emoji", *("custom" if kind == "command" else kind for kind in list(KEYS)[1:])]


def test_the_example_shows_every_key_with_its_default() -> None:
    shown = tomllib.loads(uncommented(example(KEYS)))["models"]["emoji"]
    model = built_in(KEYS).models["emoji"]
    assert shown.keys() == {*ModelSettings.__struct_encode_fields__, *KEYS["imagegen"].__struct_fields__} - {
        "name",
        "options",
    }
    for key, value in msgspec.structs.asdict(parse({"models": {"m": shown}}, KEYS).models["m"]).items():
        if key == "options":
            continue
        default = getattr(model, key)
        assert key == "name" or default is None or value == default


def test_no_line_of_the_example_is_longer_than_a_screen_is_wide() -> None:
    assert max(map(len, example(KEYS).splitlines())) <= 120


def test_what_is_shown_reads_back_as_what_is_in_force() -> None:
    given = parse(
        {
            "server": {"listen": ["unix:/run/x.sock"]},
            "scheduler": {"keep_alive": "7m"},
            "models": {
                'o"d d': {
                    "engine": "command",
                    "memory": "1MiB",
                    "command": ["a b", 'c"\\\n\x7f', "é"],
                    "env": {"A.B": "${X}", "C": ""},
                    "concurrency": 3,
                    "queue": 4,
                    "load_timeout": 0.125,
                }
            },
        },
        KEYS,
        "/etc/x.toml",
    )
    text = show(given)
    assert text.startswith("# source: /etc/x.toml\n")
    assert 'keep_alive = "7m"                   # from [scheduler]' in text
    assert "# health: as the engine has it" in text
    again = parse(tomllib.loads(text), KEYS, given.source)
    model = msgspec.structs.replace(again.models['o"d d'], keep_alive=None)  # shown as inherited
    assert msgspec.structs.replace(again, models={model.name: model}) == given


def accepts(document: dict[str, Any]) -> bool:
    validator = jsonschema.Draft202012Validator(schema(KEYS))
    return bool(validator.is_valid(document))


def test_the_schema_is_one_and_accepts_the_example() -> None:
    jsonschema.Draft202012Validator.check_schema(schema(KEYS))
    assert accepts(tomllib.loads(example(KEYS)))
    assert accepts(tomllib.loads(uncommented(example(KEYS))))
    assert accepts(tomllib.loads(show(built_in(KEYS))))


@pytest.mark.parametrize(
    "document",
    [
        {"x": 1},
        {"server": {"x": 1}},
        {"server": {"listen": "a:1"}},
        {"server": {"max_body": "64MX"}},
        {"scheduler": {"keep_alive": "soon"}},
        {"scheduler": {"queue": 0}},
        {"models": {"a": {}}},
        {"models": {"a": {"engine": "x"}}},
        {"models": {"a": {"engine": "imagegen", "keep_alve": 1}}},
        {"models": {"a": {"engine": "imagegen", "command": ["x"]}}},
        {"models": {"a": {"engine": "command"}}},
        {"models": {"a": {"engine": "command", "command": []}}},
        {"models": {"a": {"engine": "command", "command": ["x"], "dialect": "x"}}},
        {"models": {"a": {"engine": "imagegen", "name": "b"}}},
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(document: dict[str, Any]) -> None:
    assert not accepts(document)
    with pytest.raises(ConfigError):
        parse(document, KEYS)


def test_the_schema_describes_every_key() -> None:
    def keys(table: dict[str, Any]) -> dict[str, Any]:
        properties: dict[str, Any] = table["properties"]
        return properties

    top = keys(schema(KEYS))
    tables = [keys(top["server"]), keys(top["scheduler"])]
    tables += [keys(branch["then"]) for branch in top["models"]["additionalProperties"]["allOf"]]
    assert len(tables) == 2 + len(KEYS)
    for table in tables:
        for key, about in table.items():
            assert about.get("description"), key
    assert Settings.__struct_fields__[:4] == tuple(top)
    assert tables[0]["max_body"]["default"] == "64MiB"
    assert tables[1]["keep_alive"]["default"] == "5m"
