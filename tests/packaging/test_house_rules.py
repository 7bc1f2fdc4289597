"""tests/conftest.py keeps its promises: each broken rule fails the test that broke it, and only that one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCKING = """
import os
import time
from pathlib import Path

def sleep():
    time.sleep(0.001)

def read(path):
    return Path(path).read_text()

def swallow(path):
    try:
        Path(path).read_text()
    except Exception:
        pass

def name(path):
    os.stat(path)
"""

TESTS = """
import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest

sys.path.append(os.path.join(os.path.dirname(__file__), "mlxsup"))
import blocking

KEPT = []


async def test_runs_on_both():
    name = type(asyncio.get_running_loop()).__module__
    assert name.startswith(("asyncio", "uvloop"))

@pytest.mark.loops("uvloop")
async def test_runs_on_one():
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")

async def test_tidy():
    child = await asyncio.create_subprocess_exec("true", stdout=subprocess.PIPE)
    await child.communicate()
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await reader.read()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    await asyncio.to_thread(time.sleep, 0)
    with tempfile.TemporaryDirectory():
        pass

async def test_leaves_a_task():
    KEPT.append(asyncio.create_task(asyncio.sleep(60)))

async def test_leaves_a_child():
    KEPT.append(subprocess.Popen(["sleep", "60"]))

def test_leaves_an_orphan():
    subprocess.run(["sh", "-c", "setsid sleep 60 & exit 0"], check=True)

async def test_leaves_a_descriptor():
    KEPT.append(os.open("/dev/null", os.O_RDONLY))

def test_leaves_a_pipe():
    KEPT.append(os.pipe())

def test_leaves_a_thread():
    KEPT.append(threading.Thread(target=time.sleep, args=(3,), daemon=True))
    KEPT[-1].start()

def test_leaves_a_file():
    KEPT.append(tempfile.mkdtemp())

async def test_blocks_by_sleeping():
    blocking.sleep()

async def test_blocks_by_reading():
    blocking.read(__file__)

async def test_blocks_and_swallows():
    blocking.swallow(__file__)

async def test_blocks_by_name():
    blocking.name(__file__)

async def test_may_look_at_its_own_names():
    blocking.name(os.environ["TMPDIR"])

async def test_may_read_proc():
    if sys.platform == "linux":
        blocking.read("/proc/self/stat")

@pytest.mark.may_block("it says so")
async def test_may_block_when_it_says_so():
    blocking.sleep()

def test_may_block_without_a_loop():
    blocking.sleep()

async def test_may_block_in_a_thread():
    await asyncio.to_thread(blocking.sleep)

@pytest.mark.timeout(4)
async def test_hangs():
    await asyncio.Event().wait()

def test_is_away_from_home():
    assert not [name for name in os.environ if name.startswith("MLXSUP_")]
    assert os.environ["XDG_CONFIG_HOME"].startswith(os.environ["TMPDIR"])
"""

BOTH = ("asyncio", "uvloop")
GOOD: tuple[str, ...] = ("test_runs_on_both", "test_tidy", "test_may_look_at_its_own_names", "test_may_read_proc")
GOOD += ("test_may_block_when_it_says_so", "test_may_block_in_a_thread")
BAD = {
    "test_leaves_a_task": "pending task",
    "test_leaves_a_child": "sleep 60",
    "test_leaves_a_descriptor": "/dev/null",
    "test_blocks_by_sleeping": "blocked by time.sleep",
    "test_blocks_by_reading": "blocked by io.TextIOWrapper.read",
    "test_blocks_and_swallows": "blocked by io.TextIOWrapper.read",
    "test_blocks_by_name": "blocked by os.stat",
}
BAD_WITHOUT_LOOP = {
    "test_leaves_an_orphan": "sleep 60",
    "test_leaves_a_pipe": "descriptor",
    "test_leaves_a_thread": "thread <Thread",
    "test_leaves_a_file": "temporary file",
}


@pytest.mark.timeout(60)
def test_house_rules(tmp_path: Path) -> None:
    (tmp_path / "mlxsup").mkdir()
    (tmp_path / "mlxsup" / "blocking.py").write_text(BLOCKING)
    (tmp_path / "test_sample.py").write_text(TESTS)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-rA", tmp_path]
    done = subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    outcomes: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"(?m)^(PASSED|FAILED|ERROR) \S+::(\S+)", done.stdout):
        outcomes.setdefault(name, set()).add(outcome)

    expected: dict[str, set[str]] = {f"{name}[{loop}]": {"PASSED"} for name in GOOD for loop in BOTH}
    expected |= {f"{name}[{loop}]": {"PASSED", "ERROR"} for name in BAD for loop in BOTH}
    expected |= {name: {"PASSED", "ERROR"} for name in BAD_WITHOUT_LOOP}
    expected |= {f"test_hangs[{loop}]": {"FAILED"} for loop in BOTH}
    expected |= {name: {"PASSED"} for name in ("test_may_block_without_a_loop", "test_is_away_from_home")}
    expected["test_runs_on_one[uvloop]"] = {"PASSED"}
    assert outcomes == expected, done.stdout
    for name, words in (BAD | BAD_WITHOUT_LOOP | {"test_hangs": "still running after 3.2 s"}).items():
        reports = re.split(r"(?m)^_{3,} (?:ERROR at teardown of )?(?=test_)", done.stdout)
        assert any(report.startswith(name) and words in report for report in reports), f"{name}\n{done.stdout}"
