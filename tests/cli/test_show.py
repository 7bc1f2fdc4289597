"""`mlxsup show`: what a picture says of how it was made, and what is said of those that say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mlxsup.cli import main
from mlxsup.metadata import KEY, Settings, exif_block, png_text

Capture = pytest.CaptureFixture[str]
HEART = Settings(prompt="a red heart", seed=7, steps=8, guidance=1.5, width=64, height=32, model="builtin:emoji")


def _picture(path: Path, settings: Settings | None = HEART) -> Path:
    image = Image.new("RGB", (64, 32), "red")
    if settings is None:
        image.save(path)
    elif path.suffix == ".png":
        image.save(path, pnginfo=png_text(settings))
    else:
        image.save(path, exif=exif_block(settings))
    return path


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpeg"])
def test_a_line_for_each_setting(name: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["show", str(_picture(tmp_path / name))]) == 0
    said = capsys.readouterr()
    lines = dict(line.split(None, 1) for line in said.out.splitlines())
    assert {name: lines[name] for name in ("prompt", "seed", "steps", "guidance", "width", "height", "model")} == {
        "prompt": "a red heart",
        "seed": "7",
        "steps": "8",
        "guidance": "1.5",
        "width": "64",
        "height": "32",
        "model": "builtin:emoji",
    }
    assert said.err == ""


def test_several_pictures_each_with_its_name_and_one_bad_one_does_not_stop_the_rest(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "plain.png", None)
    (tmp_path / "text.png").write_text("no picture")
    _picture(tmp_path / "b.webp")
    assert main(["show", "a.png", "plain.png", "none.png", "text.png", ".", "b.webp"]) == 1
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if not line.startswith(" ")] == ["a.png", "b.webp"]
    expected = [
        "mlxsup: plain.png has no settings in it",
        "mlxsup: none.png cannot be read: No such file or directory",
        "mlxsup: text.png is no picture: ",
        "mlxsup: . cannot be read: Is a directory",
    ]
    for line, begins in zip(said.err.splitlines(), expected, strict=True):
        assert line.startswith(begins)


def test_json_is_a_line_for_each_picture(tmp_path: Path, capsys: Capture) -> None:
    first, second = _picture(tmp_path / "a.png"), _picture(tmp_path / "ä.png", None)
    assert main(["show", "--json", str(first), str(second)]) == 1
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["picture"] == str(first)
    assert (one["settings"]["prompt"], one["settings"]["seed"]) == ("a red heart", 7)
    assert other == {"picture": str(second), "settings": None}


def test_no_picture_commands_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    text = r'{"prompt": "\u001b[31mred\n\u202e", "\u001b": [1, "\u009b"]}'
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, text)
    path = tmp_path / "evil.png"
    Image.new("RGB", (1, 1)).save(path, pnginfo=info)
    assert main(["show", str(path)]) == 0
    said = capsys.readouterr().out
    assert said == 'prompt  \\x1b[31mred\\n\\u202e\n\\x1b    [1, "\\x9b"]\n'
    assert main(["show", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["settings"] == json.loads(text)


def test_what_the_model_that_ships_writes_can_be_shown(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.webp"
    run = ["run", "emoji", "a red heart", "--local", "--seed", "9", "--steps", "1", "--width", "64", "--height", "64"]
    assert main([*run, "--output", str(path)]) == 0
    capsys.readouterr()
    assert main(["show", "--json", str(path)]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a red heart", 9, 1)


def test_without_a_picture_it_is_wrong_usage(capsys: Capture) -> None:
    assert main(["show"]) == 2
    assert "PICTURE requires an argument; see mlxsup show --help" in capsys.readouterr().err


def test_without_pillow_the_line_says_what_to_install(tmp_path: Path) -> None:
    path = _picture(tmp_path / "x.png")
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise ModuleNotFoundError('No module named PIL', name='PIL')")
    done = subprocess.run(
        [sys.executable, "-m", "mlxsup", "show", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mlxsup: PIL is not installed; mend: pip install 'mlxsup[imagegen]'\n"
