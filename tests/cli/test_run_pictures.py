"""`mlxsup run` on a terminal: previews and the picture are drawn where it can show them, in one place, and nowhere else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mlxsup.cli.terminal.graphics import Pixels, half_blocks
from mlxsup.testing import Gate, fake_runner, picture
from tests.cli.terminals import Ended, Screen, on_terminal
from tests.daemon.children import command, serving, write_config

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the command brings its own loop

KITTY = {"TERM": "xterm-kitty"}
BLOCKS = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
NO_SIXEL = "\x1b[?62;22c"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def _png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64), kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def _line(phase: str, image: bytes, **told: object) -> str:
    return f"line@{phase}=" + json.dumps({"image": base64.b64encode(image).decode(), **told})


def _scenario(*previews: bytes, final: bytes, more: str = "") -> str:
    """Answer with these previews and this picture."""
    parts = [_line(str(n), preview, preview=True, step=n, total=9) for n, preview in enumerate(previews, 1)]
    return "; ".join((f"steps={len(previews)}", "done=no", more, *parts, _line("final", final, done=True, seed=7)))


async def _run(
    folder: Path,
    scenario: str,
    env: dict[str, str],
    *flags: str,
    answer: str = NO_SIXEL,
    cell: tuple[int, int] = (0, 0),
) -> Ended:
    config = write_config(folder, {"m": fake_runner(scenario)})
    arguments = ("run", "m", "p", "-o", "x.png", "--config", str(config), *flags)
    async with on_terminal(*arguments, cwd=folder, env=env, answer=answer, cell=cell) as terminal:
        return await terminal.ended()


def _said(screen: Screen) -> list[str]:
    return [line for line in screen.text() if line and "▀" not in line]


async def test_kitty_gets_previews_and_picture_in_one_place_and_one_number(tmp_path: Path) -> None:
    files = [_png(RED), _png(GREEN), _png(BLUE)]
    ended = await _run(tmp_path, _scenario(*files[:2], final=files[2]), KITTY, "--previews", "2")
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")
    drawn = ended.screen.kitty_pictures()
    assert [file for _, file, _ in drawn] == files
    assert {(drawing.line, drawing.column) for _, _, drawing in drawn} == {(0, 0)}
    assert len({keys["i"] for keys, _, _ in drawn}) == 1
    assert all((keys["c"], keys["r"]) == ("40", "20") for keys, _, _ in drawn)
    assert (tmp_path / "x.png").read_bytes() == files[2]
    (told,) = _said(ended.screen)  # the bar is gone
    assert told.startswith("x.png: 0 KiB, seed 7, ")
    assert ended.screen.text()[20] == told
    assert "\x1b[c" not in ended.written


async def test_half_blocks_show_the_last_picture_and_leave_nothing_of_the_others(tmp_path: Path) -> None:
    scenario = _scenario(_png(RED, (64, 64)), _png(GREEN, (32, 64)), final=_png(BLUE, (128, 64)))
    ended = await _run(tmp_path, scenario, BLOCKS, "--previews", "2")
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")
    assert ended.written.count("\x1b[c") == 1
    for colour in (RED, GREEN, BLUE):
        assert f"38;2;{';'.join(map(str, colour))}" in ended.written
    lines = ended.screen.text()
    assert lines[:10] == ["▀" * 40] * 10
    assert lines[10:20] == [""] * 10
    assert {(cell.upper, cell.lower) for line in ended.screen.lines[:10] for cell in line[:40]} == {("2;0;0;255",) * 2}
    assert lines[20].startswith("x.png: ")
    assert len(_said(ended.screen)) == 1


async def test_256_colours_are_enough(tmp_path: Path) -> None:
    ended = await _run(tmp_path, _scenario(final=_png(RED)), {"TERM": "xterm-256color"})
    expected = Screen()
    expected.feed("\n" * 20 + "\x1b[20A" + half_blocks(Pixels(40, 40, bytes(RED) * 1600), true_colour=False))
    assert ended.screen.lines[:20] == expected.lines[:20]


@pytest.mark.parametrize("by", ["answer", "system", "nobody"])
async def test_sixel_where_the_terminal_says_so_in_the_size_of_its_cells(by: str, tmp_path: Path) -> None:
    answer = ("\x1b[6;30;15t" if by == "answer" else "") + "\x1b[?62;4c"
    cell = (6, 12) if by == "system" else (0, 0)
    scenario = _scenario(_png(RED, (100, 200)), final=_png(BLUE, (100, 200), "webp"))
    ended = await _run(tmp_path, scenario, BLOCKS, "--previews", "1", answer=answer, cell=cell)
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")
    width, height = {"answer": (15, 30), "system": (6, 12), "nobody": (8, 16)}[by]
    assert [(drawing.kind, drawing.line, drawing.column) for drawing in ended.screen.drawings] == [("sixel", 0, 0)] * 2
    for drawing in ended.screen.drawings:
        assert drawing.body.startswith(f'0;1;0q"1;1;{20 * width};{20 * height}#')
    assert "2;0;0;100" in ended.screen.drawings[1].body
    assert "▀" not in ended.written


async def test_it_scrolls_to_make_room_and_draws_in_the_same_place(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner(_scenario(_png(RED), final=_png(GREEN)))})
    arguments = ("run", "m", "p", "-o", "x.png", "--previews", "1", "--config", str(config))
    async with on_terminal(*arguments, cwd=tmp_path, env=KITTY, rows=9) as terminal:
        ended = await terminal.ended()
    assert ended.code == 0
    assert [(drawing.line, drawing.column) for _, _, drawing in ended.screen.kitty_pictures()] == [(0, 0)] * 2
    assert [(keys["c"], keys["r"]) for keys, _, _ in ended.screen.kitty_pictures()] == [("10", "5")] * 2
    assert ended.screen.text()[5].startswith("x.png")


async def test_a_late_answer_is_not_typed_at_the_prompt(tmp_path: Path) -> None:
    async with Gate() as gate:
        scenario = _scenario(_png(RED), final=_png(GREEN), more=f"gate@2={gate.path}")
        config = write_config(tmp_path, {"m": fake_runner(scenario)})
        arguments = ("run", "m", "p", "-o", "x.png", "--previews", "1", "--config", str(config))
        async with on_terminal(*arguments, cwd=tmp_path, env=BLOCKS) as terminal:
            await terminal.shows("▀")
            terminal.type("\x1b[?62;4c")
            await terminal.shows("^[[?62;4c")  # it has arrived
            (await gate.arrival()).go()
            ended = await terminal.ended()
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")


@pytest.mark.parametrize(
    ("env", "flags"),
    [
        ({**KITTY, "NO_COLOR": "1"}, ()),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, ()),
        (KITTY, ("--previews", "0")),
        (KITTY, ("--json",)),
        ({"TERM": "vt100"}, ()),
        ({**BLOCKS, "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}, ()),
    ],
)
async def test_no_picture_where_none_is_wanted_or_can_be_shown(
    env: dict[str, str], flags: tuple[str, ...], tmp_path: Path
) -> None:
    ended = await _run(tmp_path, _scenario(_png(RED), final=_png(GREEN)), env, *flags)
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")
    assert not ended.screen.drawings
    assert "▀" not in ended.written
    assert (tmp_path / "x.png").read_bytes() == _png(GREEN)


@pytest.mark.parametrize("env", [KITTY, BLOCKS])
async def test_what_is_no_picture_is_left_out_and_the_run_goes_on(env: dict[str, str], tmp_path: Path) -> None:
    scenario = _scenario(
        b"\x89PNG\r\n\x1a\n nonsense", final=picture(3000), more='line@first={"image":"?","preview":true}'
    )
    ended = await _run(tmp_path, scenario, env, "--previews", "2")
    assert ended.code == 0
    assert not ended.screen.drawings
    assert "▀" not in ended.written
    assert (tmp_path / "x.png").read_bytes() == picture(3000)


@pytest.mark.parametrize("env", [KITTY, BLOCKS])
async def test_without_pillow_kitty_gets_png_files_and_others_get_nothing(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "modules" / "PIL").mkdir(parents=True)
    (tmp_path / "modules" / "PIL" / "__init__.py").write_text("raise ModuleNotFoundError('No PIL', name='PIL')")
    where = {"PYTHONPATH": str(tmp_path / "modules")}
    scenario = _scenario(_png(RED, kind="webp"), _png(GREEN), final=_png(BLUE, kind="jpeg"))
    ended = await _run(tmp_path, scenario, {**env, **where}, "--previews", "2")
    assert ended.code == 0
    assert [file for _, file, _ in ended.screen.kitty_pictures()] == ([_png(GREEN)] if env == KITTY else [])
    assert "▀" not in ended.written


async def test_other_engines_are_not_asked_for_previews_unless_a_person_does(tmp_path: Path) -> None:
    record = tmp_path / "record"
    ended = await _run(tmp_path, _scenario(final=_png(RED), more=f"record={record}"), KITTY)
    assert [file for _, file, _ in ended.screen.kitty_pictures()] == [_png(RED)]
    (body,) = [line.split(" ", 2)[2] for line in record.read_text().splitlines() if line.startswith("request")]
    assert json.loads(body).keys() == {"prompt", "seed"}


async def test_json_has_previews_in_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner(_scenario(_png(RED), final=_png(GREEN)))})
    arguments = ("run", "m", "p", "-o", "x.png", "--previews", "1", "--json", "--config", str(config))
    code, out, lines = await command(*arguments, cwd=tmp_path)
    assert (code, lines) == (0, [])
    preview = next(chunk for line in out.splitlines() if (chunk := json.loads(line)).get("preview"))
    assert preview == {"image": base64.b64encode(_png(RED)).decode(), "preview": True, "step": 1, "total": 9}
    last = json.loads(out.splitlines()[-1])
    assert (last["image"], last["output"]) == ("", "x.png")


async def test_plain_lines_have_no_previews_in_them(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner(_scenario(_png(RED), final=_png(GREEN)))})
    arguments = ("run", "m", "p", "-o", "x.png", "--previews", "1", "--config", str(config))
    code, out, lines = await command(*arguments, cwd=tmp_path)
    assert (code, out) == (0, "")
    assert [line.split(":")[0] for line in lines] == ["step 0/1", "step 1/9", "step 1/1", "x.png"]
    assert (tmp_path / "x.png").read_bytes() == _png(GREEN)


@pytest.mark.parametrize(
    ("model", "flags", "asked"),
    [("a", [], [3, None]), ("other", [], [None]), ("a", ["--previews", "3"], [3])],
)
async def test_previews_that_nobody_asked_for_are_given_up_when_they_are_refused(
    model: str, flags: list[str], asked: list[int | None], tmp_path: Path
) -> None:
    """An older daemon does not know them, and a pipeline may not be able to make them."""
    bodies = []

    async def old_daemon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split()[0]) if "content-length:" in head else 0
        body = await reader.readexactly(length)
        status, answer = (
            200,
            b'{"runners":[{"model":"m","engine":"imagegen","path":"","aliases":["a"],"state":"ready"}]}',
        )
        if "post /completion" in head:
            bodies.append(json.loads(body))
            status, answer = 200, json.dumps({"image": base64.b64encode(_png(RED)).decode(), "done": True}).encode()
            if "previews" in bodies[-1]:
                error = {
                    "code": "invalid_request",
                    "status": 400,
                    "message": "Object contains unknown field `previews`",
                }
                status, answer = 400, json.dumps({"error": error}).encode()
        writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(answer) + 1))
        writer.write(answer + b"\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(old_daemon, "127.0.0.1", 0) as server:
        url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        arguments = ("run", model, "p", "-o", "x", "--url", url, *flags)
        async with on_terminal(*arguments, cwd=tmp_path, env=KITTY) as terminal:
            ended = await terminal.ended()
    assert [body.get("previews") for body in bodies] == asked
    if flags:
        assert ended.code == 2
        assert "unknown field `previews`" in ended.written
    else:
        assert ended.code == 0, ended.written
        assert [file for _, file, _ in ended.screen.kitty_pictures()] == [_png(RED)]


@pytest.mark.parametrize("local", [True, False])
async def test_the_model_that_ships_shows_itself_at_work(local: bool, tmp_path: Path) -> None:
    entry = {"engine": "imagegen", "path": "builtin:emoji"}
    config = write_config(tmp_path, {"emoji": entry})
    arguments = ("run", "emoji", "a red heart", "-o", "x.png", "--seed", "3", "--width", "64", "--height", "64")
    async with contextlib.AsyncExitStack() as stack:
        daemon = None if local else await stack.enter_async_context(serving(config))
        whom = ("--url", daemon.url) if daemon else ("--local", "--config", str(config))
        async with on_terminal(*arguments, *whom, cwd=tmp_path, env=KITTY) as terminal:
            ended = await terminal.ended()
    assert ended.code == 0, ended.written
    files = [file for _, file, _ in ended.screen.kitty_pictures()]
    assert len(files) == 4
    assert len(set(files)) == 4
    assert files[-1] == (tmp_path / "x.png").read_bytes()
    assert {(drawing.line, drawing.column) for _, _, drawing in ended.screen.kitty_pictures()} == {(0, 0)}
    assert len(_said(ended.screen)) == 1
