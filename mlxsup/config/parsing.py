"""From the plain tables of a TOML file to Settings: every problem is found, each with its path, before one error is raised."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, Union

import msgspec

from mlxsup.config.rules import model_name
from mlxsup.config.settings import BUILT_IN, ModelSettings, SchedulerSettings, ServerSettings, Settings
from mlxsup.config.units import Duration, Size
from mlxsup.errors import ConfigError

BUILT_IN_MODELS: Final[Mapping[str, Mapping[str, str]]] = {"emoji": {"engine": "imagegen", "path": "builtin:emoji"}}
"""The models of a configuration that names none."""

NOT_KEYS: Final = frozenset({"name", "options"})
"""Fields of ModelSettings that no file may set."""

Engines = Mapping[str, type[msgspec.Struct]]
"""The kinds of engine, each with the struct of its own keys."""

_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {"server": ServerSettings, "scheduler": SchedulerSettings}
_TOO_LARGE: Final = 1 << 63
"""The first integer beyond the 64 bits of TOML."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_WORDS: Final = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "array": "a list",
    "dict": "a table",
    "object": "a table",
}

S = TypeVar("S", bound=msgspec.Struct)


def parse(mapping: Mapping[str, Any], engines: Engines, source: str = BUILT_IN, folder: str = "") -> Settings:
    """Read a configuration from plain tables, as `tomllib` gives them.

    Args:
        mapping: the tables by name; an empty one gives the defaults and the built-in model.
        engines: the kinds of engine, each with the struct of its own keys.
        source: where the tables come from, for messages.
        folder: what relative paths start from, and where runners work; "" for the folder this process is in.

    Raises:
        ConfigError: `problems` lists all that is wrong.
    """
    reader = _Reader(engines, folder)
    settings = reader.settings(mapping, source)
    if reader.problems:
        count = f"{len(reader.problems)} problems: " if len(reader.problems) > 1 else ""
        message = f"{source}: {count}{'; '.join(reader.problems)}"
        raise ConfigError(message, details={"problems": reader.problems, "source": source})
    assert settings is not None  # no problem was found
    return settings


def built_in(engines: Engines) -> Settings:
    """Return the settings that hold without any file: the defaults, and the model `emoji`."""
    return parse({}, engines)


def toml_key(name: str) -> str:
    """Write a key as TOML has it: bare where that is possible, else quoted."""
    return name if _BARE_KEY.fullmatch(name) else msgspec.json.encode(name).decode()


def unwrapped(annotation: Any) -> tuple[Any, tuple[msgspec.Meta, ...]]:
    """Part a key's type from what is said about it."""
    if typing.get_origin(annotation) is Annotated:
        inner, *metas = typing.get_args(annotation)
        return inner, tuple(meta for meta in metas if isinstance(meta, msgspec.Meta))
    return annotation, ()


def description(annotation: object) -> str:
    """Return the one line that a key's type carries, or ""."""
    return next((meta.description for meta in unwrapped(annotation)[1] if meta.description), "")


class _Bad(Exception):
    """Raised after a problem was noted."""


class _Reader:
    """Walks one configuration and notes what is wrong with it."""

    def __init__(self, engines: Engines, folder: str) -> None:
        self.engines = engines
        self.folder = folder
        self.problems: list[str] = []

    def settings(self, mapping: Mapping[str, Any], source: str) -> Settings | None:
        server, scheduler = ServerSettings(), SchedulerSettings()
        devices: dict[str, Size] = {}
        models: dict[str, ModelSettings] = {}
        for name, table in mapping.items():
            if name == "server":
                server = self._table(ServerSettings, name, table) or server
            elif name == "scheduler":
                scheduler = self._table(SchedulerSettings, name, table) or scheduler
            elif name == "devices":
                devices = self._devices(table)
            elif name == "models":
                models = self._models(table)
            else:
                self._unknown(name, "", {**_TABLES, "devices": dict, "models": ModelSettings}, _homes(name, ""))
        if not mapping.get("models"):
            models = self._models(BUILT_IN_MODELS)
        if self.problems:
            return None
        return Settings(server=server, scheduler=scheduler, devices=devices, models=models, source=source)

    # Tables

    def _table(self, kind: type[S], path: str, table: object) -> S | None:
        if not self._is_table(table, path):
            return None
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        values = self._values(path, table, fields, lambda key: _homes(key, path))
        return self._build(kind, path, values)

    def _devices(self, table: object) -> dict[str, Size]:
        field = next(field for field in msgspec.structs.fields(Settings) if field.name == "devices")
        try:
            devices: dict[str, Size] = self._value(table, field.type, "devices")
        except _Bad:
            return {}
        return devices

    def _models(self, tables: object) -> dict[str, ModelSettings]:
        models: dict[str, ModelSettings] = {}
        if not self._is_table(tables, "models"):
            return models
        owners: dict[str, str] = {}
        for name in tables:
            path = f"models.{toml_key(name)}"
            try:
                owners[model_name(name)] = path
            except ValueError as error:
                self.problems.append(f"{path}: {error}")
        for name, table in tables.items():
            path = f"models.{toml_key(name)}"
            model = self._model(name, path, table, owners)
            if model is not None:
                models[name] = model
        return models

    def _model(self, name: str, path: str, table: object, owners: dict[str, str]) -> ModelSettings | None:
        if not self._is_table(table, path):
            return None
        before = len(self.problems)
        engine = self._engine(path, table)
        common = {
            field.encode_name: field for field in msgspec.structs.fields(ModelSettings) if field.name not in NOT_KEYS
        }
        own_struct = self.engines[engine] if engine else None
        own = {field.encode_name: field for field in msgspec.structs.fields(own_struct)} if own_struct else {}
        values = self._values(path, table, common | own, lambda key: self._model_homes(key, path, engine))
        self._take_names(values.get("aliases", []), path, owners)
        if len(self.problems) > before or own_struct is None:
            return None
        if not (values.get("path") or values.get("memory")):
            self.problems.append(f"{path}.memory: missing; without a path nothing tells how much memory it needs")
            return None
        options = self._build(own_struct, path, {key: value for key, value in values.items() if key in own})
        if options is None:
            return None
        shared = {key: value for key, value in values.items() if key in common}
        return self._build(ModelSettings, path, {"cwd": self.folder, **shared, "name": name, "options": options})

    def _take_names(self, aliases: list[str], path: str, owners: dict[str, str]) -> None:
        for index, alias in enumerate(aliases):
            at = f"{path}.aliases[{index}]"
            owner = owners.setdefault(alias, at)
            if owner != at:
                self.problems.append(f"{at}: {alias!r} is taken already by {owner}")

    def _engine(self, path: str, table: Mapping[str, Any]) -> str | None:
        """Return the model's kind of engine, or None; a missing one is noted with all other missing keys."""
        engine = table.get("engine")
        if not isinstance(engine, str) or engine in self.engines:
            return engine if isinstance(engine, str) else None
        self.problems.append(f"{path}.engine: {engine!r} is no engine{_meant(engine, self.engines)} ({self._one_of()})")
        return None

    def _model_homes(self, key: str, path: str, engine: str | None) -> str | None:
        owners = [kind for kind, keys in self.engines.items() if key in keys.__struct_encode_fields__]
        if not owners:
            return _homes(key, path)
        return f"a key of engine {' or '.join(owners)}, not of {engine}" if engine else ""

    def _one_of(self) -> str:
        return f"one of {', '.join(self.engines)}"

    # Keys and values

    def _values(
        self,
        path: str,
        table: Mapping[str, Any],
        fields: Mapping[str, msgspec.structs.FieldInfo],
        home: Callable[[str], str | None],
    ) -> dict[str, Any]:
        """Convert the table's values; `home` says where an unknown key belongs ("": pass it over, None: nowhere)."""
        values = {}
        for key, value in table.items():
            if key not in fields:
                self._unknown(key, f"{path}.", fields, home(key))
                continue
            try:
                values[key] = self._value(value, fields[key].type, f"{path}.{toml_key(key)}")
            except _Bad:
                continue
        for key, field in fields.items():
            if field.required and key not in table:
                what = self._one_of() if key == "engine" else description(field.type)
                self.problems.append(f"{path}.{key}: missing" + (f"; {what}" if what else ""))
        return values

    def _value(self, value: object, annotation: Any, path: str) -> Any:
        inner, metas = unwrapped(annotation)
        origin, arguments = typing.get_origin(inner), typing.get_args(inner)
        if isinstance(value, int) and not -_TOO_LARGE <= value < _TOO_LARGE:
            self._bad(path, "a number of more than 64 bits")
        if origin in {Union, types.UnionType}:
            arms = [arm for arm in arguments if arm is not types.NoneType]
            if value is not None and len(arms) == 1:
                value = self._value(value, arms[0], path)
        elif origin is list and isinstance(value, list):
            value = self._all(lambda at: self._value(at[1], arguments[0], f"{path}[{at[0]}]"), enumerate(value))
        elif origin is dict and isinstance(value, Mapping):
            value = dict(self._all(lambda pair: self._pair(pair, arguments, path), value.items()))
        elif origin is Literal and type(value) in map(type, arguments) and value not in arguments:
            self._bad(path, f"expected {' or '.join(map(repr, arguments))}, not {value!r}{_meant(value, arguments)}")
        elif isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            value = self._table(inner, path, value)
            if value is None:
                raise _Bad
        try:
            value = msgspec.convert(value, annotation, dec_hook=_decode)
            rules = [meta.extra for meta in metas if meta.extra]
            for check in (rule["check"] for rule in rules if "check" in rule):
                value = check(value)
            for place in (rule["place"] for rule in rules if "place" in rule):
                value = place(value, self.folder)
        except ValueError as error:
            self._bad(path, _in_words(error))
        return value

    def _pair(self, pair: tuple[str, object], arguments: tuple[Any, ...], path: str) -> tuple[Any, Any]:
        at = f"{path}.{toml_key(pair[0])}"
        return self._value(pair[0], arguments[0], at), self._value(pair[1], arguments[1], at)

    def _all(self, convert: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Convert every item, so that all their problems are noted, before giving up on the whole."""
        done, bad = [], False
        for item in items:
            try:
                done.append(convert(item))
            except _Bad:
                bad = True
        if bad:
            raise _Bad
        return done

    def _build(self, kind: type[S], path: str, values: Mapping[str, Any]) -> S | None:
        fields = msgspec.structs.fields(kind)
        if any(field.required and field.encode_name not in values for field in fields):  # noted already
            return None
        try:
            return kind(**{field.name: values[field.encode_name] for field in fields if field.encode_name in values})
        except ValueError as error:  # a rule of the struct's own, in its __post_init__
            self.problems.append(f"{path}: {error}")
            return None

    def _is_table(self, table: object, path: str) -> typing.TypeGuard[Mapping[str, Any]]:
        if isinstance(table, Mapping):
            return True
        self.problems.append(f"{path}: expected a table, got {_word(table)}")
        return False

    def _unknown(self, key: str, prefix: str, known: Iterable[str], home: str | None) -> None:
        if home != "":
            hint = f", {home}" if home else _meant(key, known)
            self.problems.append(f"{prefix}{toml_key(key)}: unknown key{hint}")

    def _bad(self, path: str, problem: str) -> typing.NoReturn:
        self.problems.append(f"{path}: {problem}")
        raise _Bad


def _homes(key: str, path: str) -> str | None:
    """Say in which table a key that was met at `path` belongs, if it is known at all."""
    tables = [f"[{name}]" for name, kind in _TABLES.items() if name != path and key in kind.__struct_encode_fields__]
    if not path.startswith("models") and key in ModelSettings.__struct_encode_fields__ and key not in NOT_KEYS:
        tables.append("[models.NAME]")
    return f"it belongs in {' or '.join(tables)}" if tables else None


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Duration | Size):
        return kind(value)
    raise NotImplementedError(f"no key may have the type {kind.__name__}")


def _in_words(error: ValueError) -> str:
    """Put msgspec's message, `Expected `int`, got `str` - at `$``, into the words of a configuration."""
    if not isinstance(error, msgspec.ValidationError):
        return str(error)
    text = re.sub(r" - at `.*`$", "", str(error)).replace("Expected", "expected")
    return re.sub(r"`(\w+)`", lambda match: _WORDS.get(match[1], match[1]), text)


def _word(value: object) -> str:
    return _WORDS.get(type(value).__name__, type(value).__name__)


def _meant(word: object, known: Iterable[str]) -> str:
    spelt = str(word).lower().replace("-", "_")
    names = {str(name).lower().replace("-", "_"): str(name) for name in known}
    close = difflib.get_close_matches(spelt, names, n=1, cutoff=0.7)
    return f", did you mean {names[close[0]]}?" if close else ""
