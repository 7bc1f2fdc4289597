"""Every kind of mistake is found, named with its path and, where there is one, its remedy; all of them at once."""

from __future__ import annotations

import contextlib
import tomllib
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from mlxsup.config import Duration, PathText, parse
from mlxsup.errors import ConfigError


class NoKeys(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Warmup(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    every: Duration = Duration("1m")


class CommandKeys(msgspec.Struct, frozen=True, kw_only=True):
    command: Annotated[list[str], Meta(min_length=1, description="program and arguments")]
    dialect: Literal["completion", "openai"] = "completion"
    adapter: PathText | None = None
    warmup: list[Warmup] = []
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.ratio > 1:
            raise ValueError("ratio is a part of one")


ENGINES: dict[str, type[msgspec.Struct]] = {"imagegen": NoKeys, "command": CommandKeys}


def problems(toml: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(tomllib.loads(toml), ENGINES, "test.toml")
    assert caught.value.message.startswith("test.toml: ")
    assert caught.value.details["source"] == "test.toml"
    return caught.value.problems


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        # keys
        ("models.flux = { engine = 'imagegen', keep_alve = '5m' }", "models.flux.keep_alve: unknown key, did you mean keep_alive?"),
        ("models.flux = { engine = 'imagegen', keep-alive = '5m' }", "models.flux.keep-alive: unknown key, did you mean keep_alive?"),
        ("sever.listen = []", "sever: unknown key, did you mean server?"),
        ("[model.a]\nengine = 'imagegen'", "model: unknown key, did you mean models?"),
        ("xyzzy = 1", "xyzzy: unknown key"),
        ("server.keep_alive = '5m'", "server.keep_alive: unknown key, it belongs in [scheduler] or [models.NAME]"),
        ("keep_alive = '5m'", "keep_alive: unknown key, it belongs in [scheduler] or [models.NAME]"),
        ("listen = []", "listen: unknown key, it belongs in [server]"),
        ("models.a = { engine = 'imagegen', listen = [] }", "models.a.listen: unknown key, it belongs in [server]"),
        ("models.a = { engine = 'imagegen', name = 'b' }", "models.a.name: unknown key"),
        ("models.a = { engine = 'imagegen', options = {} }", "models.a.options: unknown key"),
        (
            "models.a = { engine = 'imagegen', command = ['x'] }",
            "models.a.command: unknown key, a key of engine command, not of imagegen",
        ),
        # engines
        ("models.a = { path = 'x' }", "models.a.engine: missing; one of imagegen, command"),
        (
            "models.a = { engine = 'imagegne' }",
            "models.a.engine: 'imagegne' is no engine, did you mean imagegen? (one of imagegen, command)",
        ),
        ("models.a = { engine = 3 }", "models.a.engine: expected a string, got an integer"),
        ("models.a = { engine = 'command' }", "models.a.command: missing; program and arguments"),
        *(
            (f"models.a = {{ {keys} }}", "models.a.memory: missing; without a path nothing tells how much memory it needs")
            for keys in ("engine = 'command', command = ['x']", "engine = 'imagegen'", "engine = 'imagegen', path = ''")
        ),
        # types
        ("server = 3", "server: expected a table, got an integer"),
        ("models = 'x'", "models: expected a table, got a string"),
        ("[[models]]\nengine = 'imagegen'", "models: expected a table, got a list"),
        ("models.a = ['x']", "models.a: expected a table, got a list"),
        ("models.a = { engine = 'imagegen', path = 'x', priority = 1 }", "models.a.priority: expected a string, got an integer"),
        *(
            (f"models.a = {{ engine = 'imagegen', path = 'x', {key} = {number} }}", f"models.a.{key}: a number of more than 64 bits")
            for key in ("priority", "queue", "drain_timeout")
            for number in (f"0x{'f' * 5000}", 1 << 63, -(1 << 63) - 1)
        ),
        ("server.listen = ['a..b:1']", "server.listen[0]: 'a..b' is no host"),
        *(
            (f"server.origins = ['{text}']", f"server.origins[0]: expected an origin such as \"https://ai.example.com\", or \"*\" for all, not '{text}'")
            for text in ("https://*.example.com", "https://a:b", "http://[x", "https://m\u00fcller.de", "ai.example.com", "https://", "https://a/b", "https://u@a", "//a", "https://a/?q")
        ),
        ("models.a = { engine = 'imagegen', path = 3 }", "models.a.path: expected a string, got an integer"),
        ("models.a = { engine = 'imagegen', path = 1979-05-27 }", "models.a.path: expected a string, got date"),
        ("models.a = { engine = 'imagegen', check_listener = 1 }", "models.a.check_listener: expected true or false, got an integer"),
        ("models.a = { engine = 'imagegen', aliases = 'b' }", "models.a.aliases: expected a list, got a string"),
        ("models.a = { engine = 'imagegen', aliases = ['b', 2] }", "models.a.aliases[1]: expected a string, got an integer"),
        ("models.a = { engine = 'imagegen', env.B = 3 }", "models.a.env.B: expected a string, got an integer"),
        ("models.a = { engine = 'imagegen', env = ['B'] }", "models.a.env: expected a table, got a list"),
        ("models.a = { engine = 'command', command = 'run me' }", "models.a.command: expected a list, got a string"),
        ("models.a = { engine = 'command', command = [] }", "models.a.command: expected a list of length >= 1"),
        (
            "models.a = { engine = 'command', command = ['x'], dialect = 'opanai' }",
            "models.a.dialect: expected 'completion' or 'openai', not 'opanai', did you mean openai?",
        ),
        (
            "models.a = { engine = 'command', command = ['x'], warmup = [{ prompt = 'a' }, { every = 'x' }] }",
            "models.a.warmup[1].prompt: missing",
        ),
        ("models.a = { engine = 'command', command = ['x'], memory = 1, ratio = 2 }", "models.a: ratio is a part of one"),
        # numbers, durations, sizes
        ("models.a = { engine = 'imagegen', concurrency = 0 }", "models.a.concurrency: expected an integer >= 1"),
        ("models.a = { engine = 'imagegen', concurrency = true }", "models.a.concurrency: expected an integer, got true or false"),
        ("models.a = { engine = 'imagegen', queue = -1 }", "models.a.queue: expected an integer >= 1"),
        ("scheduler.queue = 0", "scheduler.queue: expected an integer >= 1"),
        ("scheduler.load_timeout = -5", "scheduler.load_timeout: must be more than 0, got -5s"),
        ("scheduler.load_timeout = 0", "scheduler.load_timeout: must be more than 0, got 0s"),
        ("models.a = { engine = 'imagegen', load_timeout = '-1m' }", "models.a.load_timeout: must be more than 0, got -1m"),
        ("models.a = { engine = 'imagegen', drain_timeout = -1 }", "models.a.drain_timeout: must not be negative, got -1s"),
        (
            "scheduler.keep_alive = 'soon'",
            """scheduler.keep_alive: expected a duration such as "5m", "1h30m", "250ms" or a number of seconds, not 'soon'""",
        ),
        ("server.max_body = 0", "server.max_body: must be more than 0, got 0B"),
        (
            "server.max_body = '64MX'",
            "server.max_body: 'MX' is no unit of size; use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB",
        ),
        # addresses
        ("server.listen = []", "server.listen: expected a list of length >= 1"),
        ("server.listen = ['11435']", "server.listen[0]: expected host:port or unix:/path, not '11435'; did you mean '127.0.0.1:11435'?"),
        ("server.listen = ['box']", "server.listen[0]: expected host:port or unix:/path, not 'box'; did you mean 'box:11435'?"),
        ("server.listen = ['http://box:1']", "server.listen[0]: 'http://box:1' is a URL, write 'box:1'"),
        ("server.listen = ['::1:80']", "server.listen[0]: an IPv6 address stands in brackets: '[::1]:80'"),
        ("server.listen = ['a:1', 'a:65536']", "server.listen[1]: the port of 'a:65536' is not a number from 0 to 65535"),
        ("server.listen = ['a:-1']", "server.listen[0]: the port of 'a:-1' is not a number from 0 to 65535"),
        (
            "server.listen = [':80']",
            "server.listen[0]: the host is missing: '127.0.0.1:80' for this machine alone, '0.0.0.0:80' for all",
        ),
        ("server.listen = ['a b:80']", "server.listen[0]: 'a b' is no host"),
        ("server.listen = ['unix:run/m']", "server.listen[0]: the path of a unix socket begins with / or ~, not 'run/m'"),
        # names
        (
            "models.a = { engine = 'imagegen', aliases = ['b'] }\nmodels.b = { engine = 'imagegen' }",
            "models.a.aliases[0]: 'b' is taken already by models.b",
        ),
        (
            "models.a = { engine = 'imagegen', aliases = ['x'] }\nmodels.b = { engine = 'imagegen', aliases = ['y', 'x'] }",
            "models.b.aliases[1]: 'x' is taken already by models.a.aliases[0]",
        ),
        ("models.a = { engine = 'imagegen', aliases = ['a'] }", "models.a.aliases[0]: 'a' is taken already by models.a"),
        ("models.'a.b' = { engine = 'x' }", """models."a.b".engine: 'x' is no engine (one of imagegen, command)"""),
        (
            "models.'' = { engine = 'imagegen' }",
            """models."": '' is no name: it must be printable and neither begin nor end with white space""",
        ),
        # signals, health, environment
        ("models.a = { engine = 'imagegen', stop_signal = 'TERM' }", "models.a.stop_signal: 'TERM' is no signal, did you mean SIGTERM?"),
        ("models.a = { engine = 'imagegen', stop_signal = 'sigterm' }", "models.a.stop_signal: 'sigterm' is no signal, did you mean SIGTERM?"),
        ("models.a = { engine = 'imagegen', stop_signal = '15' }", "models.a.stop_signal: '15' is no signal, write a SIG name"),
        (
            "models.a = { engine = 'imagegen', health = 'health' }",
            """models.a.health: expected a path such as "/health", or "none", not 'health'""",
        ),
        ("models.a = { engine = 'imagegen', health = '/he alth' }", "models.a.health: '/he alth' holds white space"),
        ("models.a = { engine = 'imagegen', env.T = 'a${' }", "models.a.env.T: write ${NAME} for a variable, not 'a${'"),
        ("models.a = { engine = 'imagegen', env.T = '${A B}' }", "models.a.env.T: write ${NAME} for a variable, not '${A B}'"),
        ("models.a = { engine = 'imagegen', env.'A=B' = 'x' }", """models.a.env."A=B": 'A=B' is no name of an environment variable"""),
        ("models.a = { engine = 'imagegen', pass_env = [''] }", "models.a.pass_env[0]: '' is no name of an environment variable"),
    ],
)  # fmt: skip
def test_one_mistake_makes_one_problem_with_its_path(toml: str, problem: str) -> None:
    assert problem in problems(toml)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file() -> None:
    found = problems("""
        lisen = 3
        [scheduler]
        queue = 0
        [models.a]
        engine = "imagegen"
        keep_alve = "5m"
        concurrency = 0
        aliases = ["b"]
        [models.b]
        engine = "comand"
        command = ["x"]
        path = 3
    """)
    assert [problem.split(":")[0] for problem in found] == [
        "lisen",
        "scheduler.queue",
        "models.a.keep_alve",
        "models.a.concurrency",
        "models.a.aliases[0]",
        "models.b.engine",
        "models.b.path",
    ]


def test_the_message_is_one_line_that_holds_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"a": 1, "b": 2}, ENGINES, "two.toml")
    assert caught.value.message == "two.toml: 2 problems: a: unknown key; b: unknown key"


def test_a_long_socket_path_is_refused() -> None:
    (problem,) = problems(f"server.listen = ['unix:/{'x' * 103}']")
    assert "longer than the 103 bytes" in problem


tables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["engine", "path", "aliases", "keep_alive", "concurrency", "env", "stop_signal", "health", "command", "warmup", "x"]
)
models = st.dictionaries(
    st.text(max_size=3), tables | st.dictionaries(keys, tables | st.just("command"), max_size=5), max_size=3
)


@given(
    st.fixed_dictionaries({}, optional={"server": tables, "scheduler": tables, "models": tables | models, "z": tables})
)
def test_no_content_whatever_makes_anything_but_settings_or_a_config_error(mapping: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        assert parse(mapping, ENGINES).models
