"""The configuration described: its JSON schema, the commented example file, and what is in force."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import FieldInfo

from mlxsup.config.parsing import BUILT_IN_MODELS, NOT_KEYS, Engines, description, toml_key, unwrapped
from mlxsup.config.settings import ModelSettings, SchedulerSettings, ServerSettings, Settings
from mlxsup.config.units import Duration, Size, format_duration, format_size

_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {"server": ServerSettings, "scheduler": SchedulerSettings}
_INHERITED: Final = ("keep_alive", "load_timeout", "queue")
"""Keys of a model that `[scheduler]` holds for those that leave them out."""

_COMMENT_COLUMN: Final = 34
_WIDTH: Final = 120
_UNITS: Final = r"(ns|us|ms|s|m|h|d)"
_SCHEMAS: Final[Mapping[type, dict[str, Any]]] = {
    Duration: {
        "type": ["number", "string"],
        "pattern": rf"^\s*[+-]?\s*([0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?\s*{_UNITS}\s*)+)\s*$",
    },
    Size: {
        "type": ["integer", "string"],
        "minimum": 0,
        "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KkMmGgTt]?[Bb]|[KkMmGgTt][Ii][Bb])?\s*$",
    },
}

_HEAD: Final = """\
# What mlxsup can be told, each key with its default. As it stands, this file changes nothing.
#
# Durations are "250ms", "90s", "1h30m" or a number of seconds; sizes are "64MiB", "1.5GB" or a number of bytes.
# Searched for at: --config FILE, $MLXSUP_CONFIG, $XDG_CONFIG_HOME/mlxsup/config.toml (~/.config where that is unset),
# /etc/mlxsup/config.toml. `mlxsup config check` tests a file, `mlxsup config show` prints what is in force.
"""


def schema(engines: Engines) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a configuration with these engines, for editors and other checkers.

    It knows keys, types and bounds; rules between keys, such as a name used twice, are left to `parse`.
    """
    properties: dict[str, Any] = {name: _table_schema(_fields(kind), {}) for name, kind in _TABLES.items()}
    kinds = []
    for engine, keys in engines.items():
        own = {"engine": {"const": engine, "description": f"a runner of kind {engine}"}}
        kinds.append(_table_schema([*_model_fields(), *_fields(keys)], own))
    size = dict(_SCHEMAS[Size])
    properties["devices"] = {"type": "object", "additionalProperties": size}
    engine_names = {"type": "string", "enum": list(engines)}
    properties["models"] = {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "required": ["engine"],
            "properties": {"engine": engine_names},
            "allOf": [
                {"if": {"properties": {"engine": {"const": engine}}, "required": ["engine"]}, "then": kind}
                for engine, kind in zip(engines, kinds, strict=True)
            ],
        },
    }
    for field in _fields(Settings):
        if field.name in properties:
            properties[field.name]["description"] = description(field.type)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlxsup configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def example(engines: Engines) -> str:
    """Return `config.example.toml`: each key once, with its default and its one line; as it stands it changes nothing."""
    blocks = [_HEAD.rstrip("\n").split("\n")]
    blocks += [[f"[{name}]", *_lines(_fields(kind))] for name, kind in _TABLES.items()]
    devices = next(field for field in _fields(Settings) if field.name == "devices")
    blocks.append(["[devices]", *_line("cpu", Size("8GiB"), description(devices.type), prefix="# ")])
    for name, values in BUILT_IN_MODELS.items():
        engine = values["engine"]
        kinds = f"the kind of runner: {' | '.join(engines)}"
        given = _line("engine", engine, kinds)
        given += _line("path", values["path"], _described(_model_fields(), "path"))
        rest = [field for field in _model_fields() if field.name not in values]
        blocks.append([f"[models.{name}]", *given, *_lines([*rest, *_fields(engines[engine])], prefix="# ")])
    shown = {values["engine"] for values in BUILT_IN_MODELS.values()}
    for engine, keys in engines.items():
        if engine not in shown:
            blocks.append(_engine_example(engine, keys))
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def show(settings: Settings) -> str:
    """Return what is in force as TOML, its source in the first line; values that the engine decides are comments."""
    blocks = [[f"# source: {settings.source}"]]
    for name, struct in (("server", settings.server), ("scheduler", settings.scheduler)):
        blocks.append([f"[{name}]", *(line for key, value in _items(struct) for line in _line(key, value))])
    if settings.devices:
        lines = [line for name, size in settings.devices.items() for line in _line(name, size)]
        blocks.append(["[devices]", *lines])
    for name, model in settings.models.items():
        block = [f"[models.{toml_key(name)}]"]
        for key, value in (*_items(model), *_items(model.options)):
            if key in NOT_KEYS:
                continue
            if value is None and key in _INHERITED:
                block += _line(key, getattr(settings.scheduler, key), "from [scheduler]")
            elif value is None:
                block.append(f"# {key}: as the engine has it")
            else:
                block += _line(key, value)
        blocks.append(block)
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def toml_value(value: object) -> str:
    """Write a value as TOML on one line.

    Raises:
        TypeError: TOML has no such value.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case Duration():
            return toml_value(format_duration(value))
        case Size():
            return toml_value(format_size(value))
        case int() | float():
            return repr(value)
        case str():
            return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(toml_value, value))}]"
        case Mapping() if value:
            return f"{{ {', '.join(f'{toml_key(key)} = {toml_value(item)}' for key, item in value.items())} }}"
        case Mapping():
            return "{}"
        case msgspec.Struct():
            return toml_value({key: item for key, item in _items(value) if item is not None})
        case _:
            raise TypeError(f"TOML has no {type(value).__name__}")


# The example


def _engine_example(engine: str, keys: type[msgspec.Struct]) -> list[str]:
    name = "custom" if engine == "command" else engine
    shown = [field for field in _model_fields() if field.name in {"path", "health"}]
    lines = [f"# [models.{toml_key(name)}]", *_line("engine", engine, prefix="# ")]
    for field in (*_fields(keys), *shown):
        lines += _line(field.encode_name, _telling(field), description(field.type), prefix="# ")
    return lines


def _lines(fields: Iterable[FieldInfo], prefix: str = "") -> list[str]:
    entries = (_line(field.encode_name, _default(field), description(field.type), prefix) for field in fields)
    return [line for entry in entries for line in entry]


def _line(key: str, value: object, comment: str = "", prefix: str = "") -> list[str]:
    """Write one key, its comment behind it where both fit, else in a line above."""
    line = f"{prefix}{toml_key(key)} = {toml_value(value)}"
    if not comment:
        return [line]
    whole = f"{line:<{_COMMENT_COLUMN}}  # {comment}"
    return [whole] if len(whole) <= _WIDTH else [f"# {comment}", line]


def _default(field: FieldInfo) -> object:
    """Return the default, or something telling where that is None or there is none."""
    default = None if field.required else _made(field)
    return _telling(field) if default is None else default


def _telling(field: FieldInfo) -> object:
    """Return the first of the key's examples, else its default, else an ellipsis."""
    examples = [meta.examples for meta in unwrapped(field.type)[1] if meta.examples]
    if examples:
        return examples[0][0]
    if not field.required:
        return _made(field)
    return ["..."] if _field_schema(field).get("type") == "array" else "..."


def _described(fields: Iterable[FieldInfo], name: str) -> str:
    return next(description(field.type) for field in fields if field.name == name)


# The schema


def _table_schema(fields: Iterable[FieldInfo], own: dict[str, Any]) -> dict[str, Any]:
    fields = list(fields)
    properties = {field.encode_name: _field_schema(field) for field in fields} | own
    table: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [field.encode_name for field in fields if field.required]:
        table["required"] = required
    return table


def _field_schema(field: FieldInfo) -> dict[str, Any]:
    """Describe one key. That None is allowed is left out: TOML cannot say it, a key is simply not there."""
    found = msgspec.json.schema(field.type, schema_hook=_custom_schema)
    if "anyOf" in found:
        arms = [arm for arm in found.pop("anyOf") if arm != {"type": "null"}]
        found |= arms[0] if len(arms) == 1 else {"anyOf": arms}
    if not field.required and _made(field) is not None:
        found["default"] = _plain(_made(field))
    return found


def _custom_schema(kind: type) -> dict[str, Any]:
    if kind in _SCHEMAS:
        return dict(_SCHEMAS[kind])
    raise NotImplementedError(f"no key may have the type {kind.__name__}")


def _plain(value: object) -> object:
    return msgspec.to_builtins(value, enc_hook=str) if not isinstance(value, Size) else str(value)


# Fields


def _fields(kind: type[msgspec.Struct]) -> tuple[FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def _model_fields() -> list[FieldInfo]:
    return [field for field in _fields(ModelSettings) if field.name not in NOT_KEYS]


def _items(struct: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    pairs = zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True)
    return ((key, getattr(struct, name)) for key, name in pairs)


def _made(field: FieldInfo) -> Any:
    """Return a key's default."""
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
