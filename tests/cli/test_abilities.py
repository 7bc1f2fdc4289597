"""What a terminal can show: by its environment, and by its own answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsup.cli.terminal.abilities import Abilities, by_environment
from tests.cli.terminals import Ended, on_terminal

TRUE = 1 << 24
ASK = "import os\nfrom mlxsup.cli.terminal.abilities import ask\nprint(ask(os.ttyname(0), {timeout}), flush=True)\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ("", None),
        ("TERM=dumb COLORTERM=truecolor", None),
        ("TERM=xterm-kitty NO_COLOR=1", None),
        ("TERM=xterm-kitty NO_COLOR=", Abilities(kitty=True, colours=TRUE)),
        ("TERM=xterm-kitty", Abilities(kitty=True, colours=TRUE)),
        ("TERM=xterm-ghostty", Abilities(kitty=True, colours=TRUE)),
        ("TERM=xterm-256color KITTY_WINDOW_ID=1", Abilities(kitty=True, colours=256)),
        ("TERM=xterm-256color TERM_PROGRAM=ghostty COLORTERM=truecolor", Abilities(kitty=True, colours=TRUE)),
        ("TERM=xterm-256color TERM_PROGRAM=WezTerm", Abilities(kitty=True, colours=256)),
        ("TERM=xterm-256color TERM_PROGRAM=konsole", Abilities(kitty=True, colours=256)),
        ("TERM=xterm-256color KONSOLE_VERSION=220401", Abilities(kitty=True, colours=256)),
        ("TERM=xterm-256color KONSOLE_VERSION=211203", Abilities(colours=256)),
        ("TERM=xterm-256color TERM_PROGRAM=vscode KITTY_WINDOW_ID=1", Abilities(colours=256)),
        ("TERM=xterm-256color TERM_PROGRAM=iTerm.app", Abilities(sixel=True, colours=256)),
        ("TERM=xterm-256color TERM_PROGRAM=Apple_Terminal", Abilities(sixel=False, colours=256)),
        ("TERM=foot COLORTERM=truecolor", Abilities(sixel=True, colours=TRUE)),
        ("TERM=tmux-256color TMUX=/tmp/x KITTY_WINDOW_ID=1 TERM_PROGRAM=tmux", Abilities(colours=256)),
        ("TERM=screen.xterm-256color STY=1 TERM_PROGRAM=WezTerm", Abilities(colours=256)),
        ("TERM=xterm COLORTERM=24bit", Abilities(colours=TRUE)),
        ("TERM=xterm-direct", Abilities(colours=TRUE)),
        ("TERM=xterm", Abilities()),
        ("TERM=linux", Abilities()),
    ],
)
def test_by_its_environment(environ: str, expected: Abilities | None) -> None:
    assert by_environment(dict(pair.split("=") for pair in environ.split())) == expected


async def _asked(folder: Path, *, answer: str, timeout: float, before: str = "") -> Ended:
    code = before + ASK.format(timeout=timeout)
    async with on_terminal(cwd=folder, env={"TERM": "xterm"}, program=("-c", code), answer=answer) as terminal:
        return await terminal.ended()


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("\x1b[?62;4;22c", "Answer(came=True, sixel=True, cell=None)"),
        ("\x1b[6;18;9t\x1b[?1;2;4c", "Answer(came=True, sixel=True, cell=(9, 18))"),
        ("\x1b[6;0;0t\x1b[?4c", "Answer(came=True, sixel=False, cell=None)"),  # its class is no attribute
        ("\x1b[?64;14;41c", "Answer(came=True, sixel=False, cell=None)"),
    ],
)
async def test_by_its_answer_of_which_nothing_is_seen_or_left(answer: str, found: str, tmp_path: Path) -> None:
    ended = await _asked(tmp_path, answer=answer, timeout=10)
    assert (ended.code, ended.restored, ended.typed) == (0, True, "")
    assert ended.written == f"\x1b[16t\x1b[c{found}\r\n"


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_a_silent_terminal_is_not_waited_for(tmp_path: Path) -> None:
    ended = await _asked(tmp_path, answer="", timeout=0.05)
    assert (ended.code, ended.restored) == (0, True)
    assert ended.screen.text()[0] == "Answer(came=False, sixel=False, cell=None)"


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_what_was_typed_ahead_stays_for_the_shell(tmp_path: Path) -> None:
    before = "import sys, select\nprint('go', flush=True)\nselect.select([0], [], [])\n"
    code = before + ASK.format(timeout=10)
    async with on_terminal(cwd=tmp_path, env={"TERM": "xterm"}, program=("-c", code)) as terminal:
        await terminal.shows("go")
        terminal.type("ls\n")
        ended = await terminal.ended()
    assert (ended.code, ended.restored, ended.typed) == (0, True, "ls\n")
    assert "\x1b[c" not in ended.written
    assert "None" in ended.written


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_in_the_background_it_is_not_asked(tmp_path: Path) -> None:
    ended = await _asked(tmp_path, answer="", timeout=10, before="import os\nos.setpgid(0, 0)\n")
    assert (ended.code, ended.restored) == (0, True)
    assert ended.written == "None\r\n"


@pytest.mark.anyio
@pytest.mark.loops("asyncio")
async def test_interrupted_it_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    code = ASK.format(timeout=60)
    async with on_terminal(cwd=tmp_path, env={"TERM": "xterm"}, program=("-c", code)) as terminal:
        await terminal.shows("\x1b[c")
        terminal.type("\x03")
        ended = await terminal.ended()
    assert ended.code != 0
    assert ended.restored
