"""`mlxsup run` as a process: pictures, texts, steps, whom it asks, and how it is interrupted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from mlxsup.cli import main
from mlxsup.testing import Gate, fake_runner, picture
from tests.daemon.children import alive, command, running, serving, write_config
from tests.waiting import LIMIT

pytestmark = [pytest.mark.anyio, pytest.mark.loops("asyncio")]  # the command brings its own loop


def _pictures(folder: Path) -> list[Path]:
    return list(folder.glob("*.png"))


async def test_a_picture_goes_to_its_file_and_the_steps_to_stderr(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a/b": fake_runner("steps=3; image=5000")})
    code, out, lines = await command("run", "a/b", "p", "--seed", "7", "--config", str(config), cwd=tmp_path)
    assert (code, out) == (0, "")
    assert (tmp_path / "a-b-7.png").read_bytes() == picture(5000)
    assert lines[:-1] == ["step 0/3", "step 1/3", "step 2/3", "step 3/3"]
    assert lines[-1].startswith("a-b-7.png: 5 KiB, seed 7, ")


async def test_all_flags_reach_the_runner(tmp_path: Path) -> None:
    record = tmp_path / "record"
    config = write_config(tmp_path, {"m": fake_runner(f"image=10; record={record}")})
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"other")
    flags = "--width 64 --height 32 --steps 2 --seed 5 --guidance 1.5 --negative-prompt blue --output there.JPG"
    flags += " --image a --image b --strength 0.4 --previews 5 --compression 80 --no-metadata"
    code, _, _ = await command("run", "m", "-p-", *flags.split(), "--config", str(config), cwd=tmp_path)
    assert code == 2  # a prompt that looks like a flag goes behind --
    code, _, _ = await command("run", *flags.split(), "--config", str(config), "--", "m", "-p-", cwd=tmp_path)
    assert code == 0
    assert (tmp_path / "there.JPG").stat().st_size == 10
    request = next(line for line in record.read_text().splitlines() if line.startswith("request"))
    assert json.loads(request.split(" ", 2)[2]) == {
        "prompt": "-p-",
        "negative_prompt": "blue",
        "guidance": 1.5,
        "width": 64,
        "height": 32,
        "steps": 2,
        "seed": 5,
        "images": ["b25l", "b3RoZXI="],
        "strength": 0.4,
        "previews": 5,
        "output_format": "jpeg",
        "output_compression": 80,
        "metadata": False,
    }


@pytest.mark.parametrize(
    ("flags", "name", "asked"),
    [
        ([], "m-3.png", None),
        (["--format", "webp"], "m-3.webp", "webp"),
        (["--format", "jpeg"], "m-3.jpg", "jpeg"),
        (["-o", "x.webp"], "x.webp", "webp"),
        (["-o", "x.jpeg", "--format", "jpeg"], "x.jpeg", "jpeg"),
        (["-o", "x.png", "--previews", "0"], "x.png", None),  # what every engine gives is not asked for
        (["-o", "x.tiff"], "x.tiff", None),
        (["-o", "x", "--format", "webp"], "x", "webp"),
    ],
)
def test_the_name_and_the_format_of_the_picture_go_together(
    flags: list[str], name: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, {"m": fake_runner(f"image=10; record={record}")})
    assert main(["run", "m", "p", "--seed", "3", "--config", str(config), *flags]) == 0
    assert (tmp_path / name).stat().st_size == 10
    request = json.loads(
        next(line for line in record.read_text().splitlines() if line[:7] == "request").split(" ", 2)[2]
    )
    assert request == {"prompt": "p", "seed": 3} | ({"output_format": asked} if asked else {})


async def test_text_streams_to_stdout(tmp_path: Path) -> None:
    async with Gate() as gate:
        config = write_config(tmp_path, {"m": fake_runner(f"tokens=3; gate@1={gate.path}")})
        async with running("run", "m", "p", "--config", str(config), cwd=tmp_path) as child:
            await child.prints("t1 ")
            (await gate.arrival()).go()
            assert await child.ended() == 0
            assert child.out == b"t1 t2 t3 \n"
            assert child.lines() == []
    assert not _pictures(tmp_path)


@pytest.mark.parametrize("local", [True, False])
async def test_json_is_a_line_for_each_chunk_and_names_the_file(local: bool, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("steps=2; image=5000")})
    arguments = ["run", "m", "p", "--json", "--output", "x.png"]
    async with serving(config) as daemon:
        whom = ["--local", "--config", str(config)] if local else ["--url", daemon.url]
        code, out, lines = await command(*arguments, *whom, cwd=tmp_path)
    assert (code, lines) == (0, [])
    *steps, last = map(json.loads, out.splitlines())
    assert steps == [{"step": step, "total": 2} for step in range(3)]
    assert (last["image"], last["output"], last["bytes"], last["done"]) == ("", "x.png", 5000, True)
    assert 0 < last["seed"] < 2**53
    assert (tmp_path / "x.png").read_bytes() == picture(5000)


async def test_it_uses_a_daemon_that_runs_where_it_is_configured(tmp_path: Path) -> None:
    record = tmp_path / "record"
    socket = tmp_path / "sock"
    config = write_config(tmp_path, {"m": fake_runner(f"record={record}")}, listen=[f"unix:{socket}"])
    run = ("run", "m", "p", "--config", str(config))
    async with serving(config, "--listen", f"unix:{socket}") as daemon:
        assert (await command(*run, cwd=tmp_path))[:2] == (0, "t1 t2 t3 \n")
        pid = await daemon.pid_of("m")
        assert f"start {pid}" in record.read_text()
        assert (await command(*run, "--local", cwd=tmp_path))[0] == 0
        assert record.read_text().count("start ") == 2
        code, _, lines = await command("run", "mm", "p", "--config", str(config), cwd=tmp_path)
        assert (code, len(lines)) == (2, 1)
        assert "did you mean m?" in lines[0]
        assert f"(asked the daemon at unix:{socket}; --local" in lines[0]
        by_environment = await command("run", "m", "p", cwd=tmp_path, env={"MLXSUP_URL": daemon.url})
        assert by_environment[:2] == (0, "t1 t2 t3 \n")
        assert record.read_text().count("start ") == 2
    assert (await command(*run, cwd=tmp_path))[0] == 0  # the daemon is gone: a supervisor of its own
    assert record.read_text().count("start ") == 3


async def test_something_else_at_the_configured_address_is_not_asked(tmp_path: Path) -> None:
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"name": "other"}')
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        listen = [f"127.0.0.1:{other.sockets[0].getsockname()[1]}"]
        config = write_config(tmp_path, {"m": fake_runner("tokens=1")}, listen=listen)
        assert (await command("run", "m", "p", "--config", str(config), cwd=tmp_path))[:2] == (0, "t1 \n")
    assert asked == [b"GET /version HTTP/1.1\r\n"]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["loading", "request", "1"])
async def test_interrupted_it_stops_the_work_and_leaves_nothing(
    which: signal.Signals, phase: str, tmp_path: Path
) -> None:
    record = tmp_path / "record"
    async with Gate() as gate:
        scenario = f"record={record}; steps=3; image=100; gate@{phase}={gate.path}"
        config = write_config(tmp_path, {"m": fake_runner(scenario)})
        async with running("run", "m", "p", "--config", str(config), cwd=tmp_path) as child:
            await gate.arrival()
            child.send(which)
            assert await child.ended() == 128 + which
            assert child.lines()[-1] == "mlxsup: interrupted, stopping"
    pid = int(record.read_text().split()[1])
    assert not alive(pid)
    assert not _pictures(tmp_path)


async def test_interrupted_it_stops_the_work_in_the_daemon_too(tmp_path: Path) -> None:
    record = tmp_path / "record"
    async with Gate() as gate:
        config = write_config(tmp_path, {"m": fake_runner(f"record={record}; tokens=9; gate@2={gate.path}")})
        async with serving(config) as daemon:
            async with running("run", "m", "p", "--url", daemon.url, cwd=tmp_path) as child:
                arrival = await gate.arrival()
                child.send(signal.SIGINT)
                assert await child.ended() == 130
                with anyio.fail_after(LIMIT):
                    await arrival.left()
            assert alive(await daemon.pid_of("m"))


async def test_a_death_in_the_middle_is_one_line_and_1(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("tokens=3; stderr@2=GPU fell off; crash@2")})
    async with serving(config) as daemon:
        for whom in (["--local", "--config", str(config)], ["--url", daemon.url]):
            code, out, lines = await command("run", "m", "p", *whom, cwd=tmp_path)
            assert (code, out) == (1, "t1 t2 \n")
            assert len(lines) == 1
            assert "GPU fell off" in lines[0]


async def test_what_the_runner_refuses_is_usage(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("status=400:width must be a multiple of 16")})
    async with serving(config) as daemon:
        for whom in (["--local", "--config", str(config)], ["--url", daemon.url]):
            code, _, lines = await command("run", "m", "p", "--width", "3", *whom, cwd=tmp_path)
            assert (code, len(lines)) == (2, 1)
            assert "width must be a multiple of 16" in lines[0]


async def test_a_large_picture_comes_whole_through_the_daemon(tmp_path: Path) -> None:
    size = 24_000_000
    config = write_config(tmp_path, {"m": fake_runner(f"steps=1; image={size}")})
    async with serving(config) as daemon:
        code, _, lines = await command("run", "m", "p", "-o", "x.png", "--url", daemon.url, cwd=tmp_path)
    assert code == 0, lines
    assert (tmp_path / "x.png").read_bytes() == picture(size)


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("steps=3; image=100; delay=0.15")})
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlxsup", "run", "m", "p", "--config", str(config), "-o", "x.png"],
            cwd=tmp_path,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
            start_new_session=True,
        )
        os.close(theirs)
        seen = bytearray()
        with contextlib.suppress(OSError):  # Linux: EIO once the other end is closed
            while part := os.read(ours, 65536):
                seen += part
        assert process.wait(LIMIT) == 0
    finally:
        os.close(ours)
    text = seen.decode()
    assert "loading" in text
    assert "3/3" in text
    assert "━" in text
    assert "\x1b[" in text
    assert text.rstrip().splitlines()[-1].strip().endswith(" s")
    assert "x.png: 0 KiB, seed " in text
    assert (tmp_path / "x.png").stat().st_size == 100


async def test_the_picture_of_the_wire_is_the_picture_of_the_file(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"m": fake_runner("steps=1; image=3000")})
    async with serving(config) as daemon:
        async with daemon.http.post("/completion", json={"model": "m", "prompt": "p"}) as answer:
            last = json.loads((await answer.read()).splitlines()[-1])
        code, _, _ = await command("run", "m", "p", "-o", "x.png", "--url", daemon.url, cwd=tmp_path)
        assert code == 0
    assert (tmp_path / "x.png").read_bytes() == base64.b64decode(last["image"])
