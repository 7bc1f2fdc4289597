"""`python -m tests.soak.flaky [--times N] [-- PYTEST OPTIONS]`: faults and races N times in a row, everything else twice.

A test that fails once fails the run, at whatever turn it was. It goes on to the end all the same, and lists each test that
failed with the number of turns in which it did: one that fails in one turn of twenty and one that always fails are different
faults. Each turn takes the files in another order, so that it is other tests that run side by side.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]
RACES = (
    *(
        "tests/faults",
        "tests/runners",
        "tests/test_supervisor.py",
        "tests/test_completion.py",
        "tests/test_deadlines.py",
    ),
    *("tests/test_eviction.py", "tests/test_asked_again.py", "tests/test_returning.py", "tests/test_making_room.py"),
)
"""Where processes and sockets meet. The scheduler alone has neither: it does the same each time."""
ELSEWHERE = ("tests/real",)
"""Has an environment of its own."""
REST_TIMES = 2
JOBS = 2


def main() -> int:
    """Repeat, count, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.flaky", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="turns of faults and races (default: 20)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="tests at a time")
    parser.add_argument("pytest", nargs="*", metavar="OPTION", help="passed on to pytest, behind --")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    races, rest = _files()
    turns = [races] * options.times + [rest] * min(REST_TIMES, options.times)
    failures: Counter[str] = Counter()
    runs = 0
    for number, what in enumerate(turns, 1):
        began = time.monotonic()
        ran, failed = _turn(what, options.jobs, options.pytest)
        runs += ran
        failures.update(failed)
        took, load = time.monotonic() - began, os.getloadavg()[0]
        console.print(
            f"turn {number} of {len(turns)}: {ran} tests, {len(failed)} failed, {took:.0f} s, load {load:.2f}"
        )
        for name in failed:
            console.print(f"  {name}", style="red", markup=False, highlight=False)
    for name, count in failures.most_common():
        console.print(f"failed in {count} turns: {name}", style="red", markup=False, highlight=False)
    console.print(f"{runs} tests run, {sum(failures.values())} failures")
    return int(bool(failures) or not runs)


def _files() -> tuple[list[str], list[str]]:
    """The files with faults and races, and the other ones."""
    names = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    names = [name for name in names if not name.startswith(ELSEWHERE)]
    races = [name for name in names if name.startswith(RACES)]
    return races, [name for name in names if name not in races]


def _turn(files: Sequence[str], jobs: int, more: Sequence[str]) -> tuple[int, list[str]]:
    """Run pytest once; returns how many tests ran, and the names of those that failed."""
    with tempfile.TemporaryDirectory(prefix="flaky-") as folder:
        found, output = Path(folder, "found.xml"), Path(folder, "output")
        shuffled = random.sample(files, len(files))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            str(jobs),
            "--dist=worksteal",
            f"--junitxml={found}",
        ]
        with output.open("wb") as file:
            done = subprocess.run([*command, *more, *shuffled], cwd=ROOT, stdout=file, stderr=file, check=False)
        cases = list(ET.parse(found).getroot().iter("testcase")) if found.exists() else []
        failed = [
            f"{case.get('classname', '')}::{case.get('name', '')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.stderr.write(output.read_text(errors="replace"))
            failed = failed or [f"pytest ended with {done.returncode}"]
        return len(cases), failed


if __name__ == "__main__":
    sys.exit(main())
