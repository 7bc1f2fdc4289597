"""What the three standard streams may be like when a command starts: closed, full, or unable to show a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxsup.testing import fake_runner
from tests.daemon.children import LIMIT, write_config


def _mlxsup(line: str, *arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run `mlxsup ARGUMENTS` from a shell, where `line` says what becomes of its streams."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {line}', "sh", sys.executable, "-m", "mlxsup", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        timeout=2 * LIMIT,
        check=False,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_with_a_closed_stream_work_is_done_all_the_same(closed: str, tmp_path: Path) -> None:
    """A runner that was given a socket as its stdin or stderr would die at its start."""
    config = write_config(tmp_path, {"m": fake_runner("steps=1; image=100")})
    done = _mlxsup(closed, "run", "m", "p", "--local", "--output", "x.png", "--config", config, cwd=tmp_path)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "x.png").stat().st_size == 100


@pytest.mark.parametrize(("closed", "descriptor"), [("<&-", 0), (">&-", 1), ("2>&-", 2)])
def test_no_file_of_ours_takes_the_number_of_a_closed_stream(closed: str, descriptor: int, tmp_path: Path) -> None:
    look = (
        "import os; from mlxsup.cli import main; main(['--version']);"
        f"open({str(tmp_path / 'found')!r}, 'w').write(os.readlink('/proc/self/fd/{descriptor}'))"
    )
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", look], timeout=LIMIT, check=True)
    assert (tmp_path / "found").read_text() == os.devnull


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("verb", ["config schema", "--help", "--version"])
def test_output_that_finds_no_room_is_one_line_and_1(verb: str, tmp_path: Path) -> None:
    done = _mlxsup(">/dev/full", *verb.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        b"mlxsup: the output cannot be written: No space left on device\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_is_told_and_finds_no_room_costs_no_work(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("steps=2; image=100")})
    done = _mlxsup("2>/dev/full", "run", "m", "p", "--local", "--output", "x", "--config", config, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "x").stat().st_size) == (0, 100)
    assert _mlxsup("2>/dev/full", "rum", cwd=tmp_path).returncode == 2


def test_names_that_the_locale_cannot_show_are_shown_as_it_can(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"grün": fake_runner()})
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = _mlxsup("", "config", "check", "--config", config, cwd=tmp_path, **ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"1 model: gr\\xfcn\n")


def test_json_is_ascii(tmp_path: Path) -> None:
    done = _mlxsup("", "simulate", "zipf", "--models", "3", "--hours", "1", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["models"] == 3
    done = _mlxsup("", "estimate", "emoji", "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.stdout.isascii()
    json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_folder_whose_name_is_no_text_is_weighed(tmp_path: Path) -> None:
    import mlxsup

    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    shipped = Path(mlxsup.__file__).parent / "imagegen" / "builtin" / "emoji.safetensors"
    (folder / "m.safetensors").symlink_to(shipped)
    for more in ([], ["--json"]):
        done = _mlxsup("", "estimate", folder, *more, cwd=tmp_path, LC_ALL="C.UTF-8")
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"safetensors" in done.stdout


@pytest.mark.parametrize("line", [["load"], ["stop"], ["explain"], ["run", "m"]])
def test_what_is_no_text_is_not_sent(line: list[str], tmp_path: Path) -> None:
    done = _mlxsup("", *line, os.fsdecode(b"a\xff"), "--url", "http://127.0.0.1:1", cwd=tmp_path, LC_ALL="C.UTF-8")
    assert done.returncode == 2
    assert b"is not valid in the encoding of the locale" in done.stderr
    assert done.stderr.count(b"\n") == 1
