"""What is asked for wrongly: one clear line, the mending step in it, exit code 2, and never a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxsup import __version__
from mlxsup.cli import main
from mlxsup.testing import fake_runner
from tests.daemon.children import write_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration with the models heart and text; we stand in its folder, with an empty file and a large one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    with (tmp_path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    return str(write_config(tmp_path, {"heart": fake_runner("image=100"), "text": fake_runner()}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rum", 'Unknown command "rum". Did you mean "run"?'),
        ("run heart", "PROMPT requires an argument; see mlxsup run --help"),
        ("run heart p --widht 3", "Unknown option: --widht. Did you mean --width?; see mlxsup run --help"),
        ("run heart p --width wide", 'unable to convert "wide" into int'),
        ("run heart p more", "Unused Tokens: ['more']"),
        ("run heart p --seed -5", "seed must be between 0 and 9007199254740991"),
        ("run heart p --local --url x:1", "--local and --url contradict each other"),
        ("run heart p --url ftp://x", "'ftp://x' is no address of a daemon; write http://host:port or unix:/path"),
        ("run heart p --url http://x..y", "'http://x..y' is no address of a daemon"),
        ("run heart p --url http://x:99999", "'http://x:99999' is no address of a daemon"),
        ("run heart p --image none.png", "--image: none.png cannot be read: No such file or directory"),
        ("run heart p --image .", "--image: . cannot be read: Is a directory"),
        ("run heart p --image empty", "--image: empty is empty"),
        ("run heart p --image empty --image large", "--image: empty is empty"),
        ("run heart p --image large", "--image: large is larger than 64 MiB"),
        ("run heart p --strength 1.1", "strength must be from 0 to 1, not 1.1"),
        ("run heart p --strength nan", "strength must be from 0 to 1, not nan"),
        ("run heart p --guidance inf", "guidance must be a finite number, not inf"),
        ("run heart p --previews -1", "previews must be from 0 to 100, not -1"),
        ("run heart p --compression 101 --format webp", "output_compression must be from 0 to 100, not 101"),
        ("run heart p --format gif", "--format"),
        (
            "run heart p --format webp --output x.png",
            "--format webp and --output x.png contradict each other; leave one of them out",
        ),
        ("run heart p --format png --output x.JPEG", "--format png and --output x.JPEG contradict each other"),
        ("run haert p", "no model is named 'haert', did you mean heart?"),
        ("serve --listen 80", "--listen: expected host:port or unix:/path, not '80'; did you mean '127.0.0.1:80'?"),
        ("runner --model m", "say which kind of runner: --imagegen-engine"),
        ("runner --imagegen-engine --model m", "give either --port or --socket"),
        ("runner --imagegen-engine --model m --port 1 --socket s", "give either --port or --socket"),
        ("config check --config nowhere.toml", "nowhere.toml: cannot be read: No such file or directory"),
    ],
)
def test_wrong_usage_is_one_line_and_2(line: str, words: str, config: str, capsys: Capture) -> None:
    if line.startswith(("run ", "serve ")):
        line += f" --config {config}"
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mlxsup: ")
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("verb", [["config", "check"], ["config", "show"], ["serve"], ["run", "heart", "p"], ["ps"]])
def test_each_problem_of_a_configuration_is_a_line(verb: list[str], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[server]\nmax_bdy = 1\n[models.m]\nengine = "imagegen"\nkeep_alve = 3\n')
    assert main([*verb, "--config", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        f"mlxsup: {path}: models.m.keep_alve: unknown key, did you mean keep_alive?",
        f"mlxsup: {path}: server.max_bdy: unknown key, did you mean max_body?",
    ]


def test_bad_toml_is_named_by_its_place(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[server]\nlisten = nothing\n")
    assert main(["config", "check", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"mlxsup: {path}:2:10: Invalid value\n"


def test_a_folder_of_configurations_that_cannot_be_looked_into_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("MLXSUP_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/" + "x" * 300)  # refused to root, too
    assert main(["config", "check"]) == 2
    assert capsys.readouterr().err == f"mlxsup: /{'x' * 300}/mlxsup/config.toml: cannot be read: File name too long\n"


@pytest.mark.parametrize("line", [["ps"], ["load", "m"], ["stop", "m"], ["explain", "m"], ["run", "m", "p"]])
def test_a_daemon_that_is_stopped_is_not_waited_for_without_end(
    line: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """The system takes connections for a process that is stopped, as for one that never accepts any."""
    monkeypatch.setattr("mlxsup.cli.client.STATUS_LIMIT", 0.2)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        assert main([*line, "--url", url]) == 1
    assert capsys.readouterr().err == (
        f"mlxsup: the daemon at {url} takes connections and gives no answer within 0.2 s; it may be stopped or overloaded:"
        " see its log, or start it anew\n"
    )


@pytest.mark.parametrize("line", ["ps", "load heart", "stop heart"])
def test_without_a_daemon_the_line_says_how_to_start_one(line: str, config: str, capsys: Capture) -> None:
    assert main([*line.split(), "--config", config]) == 1
    said = capsys.readouterr().err
    assert said == "mlxsup: no mlxsup daemon answers at http://127.0.0.1:1; start one with: mlxsup serve\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "unix:/no/such"])
def test_a_named_daemon_that_is_not_there(url: str, config: str, capsys: Capture) -> None:
    for line in (["ps"], ["run", "heart", "p"]):
        assert main([*line, "--url", url]) == 1
        assert capsys.readouterr().err == f"mlxsup: nothing answers at {url}; start the daemon with: mlxsup serve\n"


@pytest.mark.parametrize(
    ("output", "words"),
    [("no/such/x.png", "there is no folder"), (".", ". is a folder; give --output a file in it")],
)
def test_a_file_that_cannot_be_written_is_found_before_any_work(
    output: str, words: str, config: str, capsys: Capture
) -> None:
    assert main(["run", "heart", "p", "--config", config, "--output", output]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_model_that_cannot_be_loaded_is_one_line_and_1(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(
        tmp_path,
        {"m": fake_runner("stderr=no weights here; exit=3"), "n": {"engine": "imagegen", "path": "builtin:emoji"}},
    )
    assert main(["run", "m", "p", "--config", str(config), "--output", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert "no weights here" in said
    assert said.count("\n") == 1


def test_a_path_that_is_no_model_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, {"m": {"engine": "imagegen", "path": "/no/such/model"}})
    assert main(["run", "m", "p", "--config", str(config), "--output", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert "/no/such/model" in said
    assert said.count("\n") == 1


def test_without_mlx_the_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()  # what is found first, and is no MLX
    (tmp_path / "mlx" / "__init__.py").write_text("raise ModuleNotFoundError('No module named mlx', name='mlx')")
    for arguments in (
        ["runner", "--imagegen-engine", "--model", "builtin:emoji", "--socket", str(tmp_path / "s")],
        ["run", "emoji", "heart", "--local", "--output", str(tmp_path / "x.png")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "mlxsup", *arguments],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "pip install 'mlxsup[imagegen]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_version_is_quick(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    loaded = "import sys; from mlxsup.cli import main; main(['--version']); print(*sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=20, check=True)
    assert time.monotonic() - began < 5
    modules = done.stdout.split()
    assert not {"aiohttp", "uvloop", "structlog", "psutil", "mlxsup.supervisor", "mlx", "PIL"} & set(modules)


def test_help_names_every_verb(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in ("run", "show", "serve", "ps", "load", "stop", "runner", "estimate", "config"))
    for verb in ("run", "show", "serve", "ps", "load", "stop", "runner", "estimate", "config"):
        assert main([verb, "--help"]) == 0
        assert f"mlxsup {verb}" in capsys.readouterr().out


def test_config_is_checked_shown_and_described(config: str, capsys: Capture) -> None:
    assert main(["config", "check", "--config", config]) == 0
    assert capsys.readouterr().out == f"{config}: ok, 2 models: heart, text\n"
    assert main(["config", "show", "--config", config]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# source: {config}\n")
    assert "[models.heart]" in shown
    assert main(["config", "schema"]) == 0
    assert "models" in json.loads(capsys.readouterr().out)["properties"]


def test_a_reader_that_leaves_is_no_traceback(config: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mlxsup config schema | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert done.stderr == ""
