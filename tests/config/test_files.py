"""Which file is read, and what is said of one that cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxsup.config import files, read, reread, server_url
from mlxsup.engines import KEYS
from mlxsup.errors import ConfigError


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in for /etc/mlxsup/config.toml, which is not there at first."""
    file = tmp_path / "etc" / "config.toml"
    file.parent.mkdir()
    monkeypatch.setattr(files, "SYSTEM_FILE", file)
    return file


def write(file: Path, queue: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"scheduler.queue = {queue}\n")
    return file


def test_the_nearest_file_wins(system: Path, tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    settings = read(None, KEYS, environ=environ)
    assert settings.source == "built in"

    write(system, 1)
    settings = read(None, KEYS, environ=environ)
    assert (settings.scheduler.queue, settings.source) == (1, str(system))

    user = write(tmp_path / "xdg" / "mlxsup" / "config.toml", 2)
    settings = read(None, KEYS, environ=environ)
    assert (settings.scheduler.queue, settings.source) == (2, str(user))

    environ["MLXSUP_CONFIG"] = str(write(tmp_path / "named.toml", 3))
    assert read(None, KEYS, environ=environ).scheduler.queue == 3

    assert read(write(tmp_path / "given.toml", 4), KEYS, environ=environ).scheduler.queue == 4
    assert read(str(tmp_path / "given.toml"), KEYS, environ=environ).scheduler.queue == 4


@pytest.mark.parametrize("base", ["", "relative"])
def test_the_users_file_is_in_the_home_folder_unless_xdg_says_where(
    system: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / ".config" / "mlxsup" / "config.toml", 5)
    assert read(None, KEYS, environ={"XDG_CONFIG_HOME": base}).scheduler.queue == 5


def test_a_tilde_in_the_name_of_the_file_is_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.toml", 6)
    assert read("~/c.toml", KEYS, environ={}).scheduler.queue == 6


def test_relative_paths_are_seen_from_the_files_folder(tmp_path: Path) -> None:
    """A daemon is started from anywhere; what looks like a name is one, unless something of that name is there."""
    paths = {"dotted": "./later", "above": "../later", "there": "models/one", "name": "some-org/one", "whole": "/a"}
    (tmp_path / "models" / "one").mkdir(parents=True)
    file = tmp_path / "c.toml"
    entries = (f'[models.{name}]\nengine = "imagegen"\npath = "{path}"\n' for name, path in paths.items())
    file.write_text("".join(entries) + 'cwd = "./work"\nlora_paths = ["./ink"]\n')
    models = read(file, KEYS, environ={}).models
    here = str(tmp_path)
    assert {name: model.path for name, model in models.items()} == {
        "dotted": f"{here}/later",
        "above": f"{here}/../later",
        "there": f"{here}/models/one",
        "name": "some-org/one",
        "whole": "/a",
    }
    assert (models["name"].cwd, models["whole"].cwd) == (here, f"{here}/work")
    assert msgspec.to_builtins(models["whole"].options)["lora_paths"] == [f"{here}/ink"]


def test_a_path_that_is_whole_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be on the disk of a server that is gone, where a look never ends."""
    seen: list[str] = []
    look = os.lstat

    def lstat(path: Any, **more: Any) -> os.stat_result:
        seen.append(str(path))
        return look(path, **more)

    file = tmp_path / "config.toml"
    file.write_text(
        '[models.m]\nengine = "imagegen"\npath = "/dead/m"\ncwd = "/dead"\nlora_paths = ["/dead/a", "ink"]\n'
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        model = read(file, KEYS).models["m"]
    assert (model.path, model.cwd) == ("/dead/m", "/dead")
    assert f"{tmp_path}/ink" in seen, "a look has another name now"
    assert not [path for path in seen if "/dead" in path]


def test_a_named_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "no.toml"
    with pytest.raises(ConfigError) as caught:
        read(file, KEYS, environ={})
    assert caught.value.problems == [f"{file}: cannot be read: No such file or directory"]
    with pytest.raises(ConfigError, match=r"no.toml: cannot be read: .* \(\$MLXSUP_CONFIG names it\)"):
        read(None, KEYS, environ={"MLXSUP_CONFIG": str(file)})


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path, KEYS, environ={})


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"[server]\nlisten = = 3\n", ":2:10: Invalid value"),
        (b"[server", ":1:8: Expected ']'"),
        (b'[server]\na = "x', ":2:7: "),
        (b"a = 1\na = 2\n", ":2:6: Cannot overwrite a value"),
        (b'[server]\nx = "\xff"', ":2:6: not UTF-8"),
        (b"a = " + b"[" * 100_000, ": nested too deeply"),
        (b"a = " + b"1" * 5_000, ": holds a number of too many digits"),
    ],
)
def test_bad_toml_is_an_error_with_file_line_and_column(tmp_path: Path, content: bytes, place: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(file, KEYS, environ={})
    assert caught.value.message.startswith(f"{file}{place}")
    assert caught.value.problems == [caught.value.message]


def test_the_mark_of_editors_on_windows_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "bom.toml"
    file.write_bytes(b"\xef\xbb\xbfscheduler.queue = 7\r\n")
    assert read(file, KEYS, environ={}).scheduler.queue == 7
    file.write_bytes(b"\xef\xbb\xbfa = \xff")
    with pytest.raises(ConfigError, match=":1:5: not UTF-8"):
        read(file, KEYS, environ={})


def test_once_more_means_from_where_it_came(system: Path, tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    assert reread("built in", KEYS, environ=environ).source == "built in"
    write(system, 1)
    assert reread("built in", KEYS, environ=environ).source == str(system)
    user = write(tmp_path / "xdg" / "mlxsup" / "config.toml", 2)
    source = read(None, KEYS, environ=environ).source
    write(user, 3)
    assert reread(source, KEYS, environ=environ).scheduler.queue == 3
    user.unlink()
    with pytest.raises(ConfigError, match=f"{user}: cannot be read: No such file"):
        reread(source, KEYS, environ=environ)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_once_more_an_empty_file_is_none(tmp_path: Path, content: bytes) -> None:
    """Whoever writes it anew has just begun; all models would go."""
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    assert read(file, KEYS, environ={}).source == str(file)
    with pytest.raises(ConfigError, match=r"c\.toml: is empty"):
        reread(str(file), KEYS, environ={})


def test_once_more_a_pipe_is_none_and_nobody_waits_for_its_writer(tmp_path: Path) -> None:
    file = tmp_path / "pipe"
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="pipe: is no regular file"):
        reread(str(file), KEYS, environ={})


def test_problems_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("x = 1")
    with pytest.raises(ConfigError) as caught:
        read(file, KEYS, environ={})
    assert caught.value.message == f"{file}: x: unknown key"
    assert caught.value.problems == ["x: unknown key"]


def test_the_url_of_the_daemon_comes_from_the_environment() -> None:
    assert server_url({}) is None
    assert server_url({"MLXSUP_URL": " "}) is None
    assert server_url({"MLXSUP_URL": "http://box:1"}) == "http://box:1"
