"""The engine for any program: its command filled in, never through a shell, and looked for before it is started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsup.config import ModelSettings, parse
from mlxsup.engines import ENGINES, KEYS, Address, Engine, Verdict
from mlxsup.errors import ConfigError, EngineUnavailable
from mlxsup.protocol import CompletionRequest, Options

ENGINE: Engine = ENGINES["command"]
AT = Address(port=4711)


def model(*command: str, name: str = "own", **keys: Any) -> ModelSettings:
    entry = {"engine": "command", "command": list(command), "memory": "1MiB", **keys}
    return parse({"models": {name: entry}}, KEYS).models[name]


class TestCheck:
    def test_a_program_with_its_path(self) -> None:
        ENGINE.check(model(sys.executable))

    def test_a_program_on_the_search_path(self) -> None:
        ENGINE.check(model("sh"))

    def test_the_interpreter(self) -> None:
        ENGINE.check(model("{python}", "server.py"))

    @pytest.mark.parametrize(
        ("program", "why"), [("/nowhere/server", "is not there"), ("no-such-program-anywhere", "is not on PATH")]
    )
    def test_one_that_is_missing(self, program: str, why: str) -> None:
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(program))
        assert f"{program} {why}" in caught.value.message
        assert "models.own.command" in caught.value.message
        assert caught.value.permanent

    def test_one_that_is_not_executable(self, tmp_path: Path) -> None:
        program = tmp_path / "server"
        program.write_text("#!/bin/sh\n")
        with pytest.raises(EngineUnavailable) as caught:
            ENGINE.check(model(str(program)))
        assert "is not executable" in caught.value.message
        assert f"chmod +x {program}" in caught.value.message

    def test_a_relative_path_is_seen_from_the_working_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "run"
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        own = model("./run", cwd=str(tmp_path))
        ENGINE.check(own)
        assert ENGINE.launch(own, Address(port=1)).argv == (str(file),)
        with pytest.raises(EngineUnavailable, match="run is not there"):
            ENGINE.check(model("./run"))

    def test_a_search_path_of_its_own_is_searched(self, tmp_path: Path) -> None:
        """The runner is started with that one, too."""
        program = tmp_path / "my-own-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        ENGINE.check(model("my-own-server", env={"PATH": str(tmp_path)}))

    def test_no_command_at_all_is_a_configuration_error(self) -> None:
        with pytest.raises(ConfigError):
            model()


class TestLaunch:
    @pytest.mark.parametrize(
        ("part", "filled"),
        [
            ("{port}", "4711"),
            ("--port={port}", "--port=4711"),
            ("http://127.0.0.1:{port}/{model}", "http://127.0.0.1:4711/own"),
            ("{path}", "/models/{port}; $HOME `id`"),
            ("{python}", sys.executable),
            ("{model}{model}", "ownown"),
            ("{other}", "{other}"),
            ("{}", "{}"),
            ("{{port}}", "{4711}"),
            ('{"json": "{model}"}', '{"json": "own"}'),
            ("$PORT ~ * `id`; exit", "$PORT ~ * `id`; exit"),
            ("", ""),
        ],
    )
    def test_placeholders(self, part: str, filled: str) -> None:
        """What is filled in is not read again, and stays one argument."""
        launch = ENGINE.launch(model("server", part, path="/models/{port}; $HOME `id`"), AT)
        assert launch.argv == ("server", filled)

    def test_a_socket(self) -> None:
        launch = ENGINE.launch(model("server", "--unix={socket}"), Address(socket="/run/1.sock"))
        assert launch.argv == ("server", "--unix=/run/1.sock")

    def test_an_interpreter_of_its_own(self) -> None:
        assert ENGINE.launch(model("{python}", python="/opt/bin/python"), AT).argv == ("/opt/bin/python",)

    @pytest.mark.parametrize(
        ("command", "transport"),
        [
            (["s", "{socket}"], "unix"),
            (["s", "--at=unix:{socket}"], "unix"),
            (["s", "{port}"], "tcp"),
            (["s", "{port}", "{socket}"], "unix"),
            (["s"], "tcp"),
        ],
    )
    def test_where_it_listens(self, command: list[str], transport: str) -> None:
        assert ENGINE.transport(model(*command)) == transport

    @pytest.mark.parametrize("part", ["{ready_fd}", "--ready-fd={ready_fd}"])
    def test_a_descriptor_to_report_on(self, part: str) -> None:
        assert ENGINE.launch(model("server", part), AT).wants_ready_fd
        assert not ENGINE.launch(model("server", "{port}"), AT).wants_ready_fd


class TestHealth:
    def test_it_is_the_one_of_the_wire(self) -> None:
        assert ENGINE.read_health(200, b"").verdict is Verdict.READY
        assert ENGINE.read_health(503, b'{"status":"loading","progress":0.5}').progress == 0.5

    def test_nothing_is_known_to_be_unsupported(self) -> None:
        assert ENGINE.unsupported(CompletionRequest(prompt="p", images=[b"x"], options=Options(top_k=1))) == []
