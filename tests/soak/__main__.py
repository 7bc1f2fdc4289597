"""`python -m tests.soak [--cycles N]`: N lives of runners, half of them on each event loop, after which nothing has grown.

Beside them 20 clients ask for ten models where three fit, with the scheduler as it is out of the box: all are answered in order,
and nothing in use is put out.

Descriptors, threads, tasks, children, files, the supervisor's tables and its objects must be as many as they were when it was
warm, and memory at most 1 MiB more. Prints a table; ends with 1 and a list of what has grown if something has.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tests.soak.counting import MAX_GROWTH, MIB, Look
from tests.soak.laps import LANES, LAPS
from tests.soak.lives import LIVES

LOOPS = ("asyncio", "uvloop")
ROOT = Path(__file__).parents[2]
FEWEST = len(LOOPS) * LANES * LAPS
TRACED = 1200


def main() -> int:
    """Run both loops side by side, print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--cycles", type=int, default=10_000, help="starts and stops in all (default: 10000)")
    options = parser.parse_args()
    if options.cycles < FEWEST:
        parser.error(f"at least {FEWEST} cycles, please")
    console = Console(width=None if sys.stdout.isatty() else 120)
    began = time.monotonic()
    found, crowds = asyncio.run(_soak(options.cycles // len(LOOPS)))
    took = time.monotonic() - began
    failed = False
    for loop, looks in found.items():
        if isinstance(looks, str):
            failed = True
            console.print(f"{loop}: ended before its time: {looks}", style="red", markup=False, highlight=False)
            continue
        console.print(_table(loop, looks))
        grown = _growth(looks)
        for line in grown:
            console.print(line, style="red", markup=False, highlight=False)
        failed = failed or bool(grown)
        if _memory_growth(looks) > MAX_GROWTH:
            console.print(f"{loop}: once more, to see where the memory goes", style="yellow")
            asyncio.run(_laps(loop, TRACED, "--trace"))
    for loop, wrong in crowds.items():
        if wrong:
            failed = True
            console.print(f"{loop}: many models, one memory: {wrong}", style="red", markup=False, highlight=False)
    kinds = f"{len(LIVES)} kinds of life"
    console.print(
        f"{options.cycles} cycles of {kinds}, 2 crowds of 200 requests, in {took:.0f} s, load {os.getloadavg()[0]:.2f}"
    )
    return int(failed)


async def _soak(cycles: int) -> tuple[dict[str, list[Look] | str], dict[str, str]]:
    """Lead the lives, and beside them serve a crowd; returns what was counted and what was wrong with the crowd, by loop."""
    laps = asyncio.gather(*(_laps(loop, cycles) for loop in LOOPS))
    crowds = asyncio.gather(*(_crowd(loop) for loop in LOOPS))
    return dict(zip(LOOPS, await laps, strict=True)), dict(zip(LOOPS, await crowds, strict=True))


async def _laps(loop: str, cycles: int, *options: str) -> list[Look] | str:
    """Lead the lives on one loop; returns what was counted, or what it said last if it failed."""
    status, out, said = await _program("tests.soak.laps", loop, str(cycles), *options)
    return msgspec.json.decode(out, type=list[Look]) if status == 0 else _last_lines(said) or f"exit code {status}"


async def _crowd(loop: str) -> str:
    status, out, said = await _program("tests.soak.crowd", loop)
    return out.decode().strip() or (f"ended before its time: {_last_lines(said)}" if status else "")


async def _program(*words: str) -> tuple[int, bytes, bytes]:
    """Run a module of Python with warnings as errors; returns its exit code, its output, and its errors, which are shown too."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", *words), stdout=pipe, stderr=pipe, cwd=ROOT
    )
    try:
        out, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    sys.stderr.write(said.decode(errors="replace"))
    return process.returncode or 0, out, said


def _last_lines(said: bytes) -> str:
    return "\n".join(said.decode(errors="replace").splitlines()[-2:])


def _table(loop: str, looks: list[Look]) -> Table:
    table = Table(title=f"{loop}: what there is after so many cycles")
    table.add_column("")
    for one in looks:
        table.add_column(str(one.cycles), justify="right")
    for kind in looks[0].counts:
        table.add_row(kind, *(str(one.total(kind)) for one in looks))
    table.add_row("memory MiB", *(f"{one.memory / MIB:.2f}" for one in looks))
    return table


def _growth(looks: list[Look]) -> list[str]:
    """What has grown from the first look to the last and was there one look before, too; and what should not be there at all."""
    first, before, last = looks[0], looks[-2], looks[-1]
    grown = [line for line in last.beyond(first) if _what(line) in _whats(before, first)]
    grown += [f"left at rest: {line}" for line in last.left]
    if (memory := _memory_growth(looks)) > MAX_GROWTH:
        grown.append(f"memory: {memory / MIB:.2f} MiB more than when it was warm, {MAX_GROWTH / MIB:g} may be")
    return grown


def _whats(look: Look, earlier: Look) -> set[str]:
    return {_what(line) for line in look.beyond(earlier)}


def _what(line: str) -> str:
    return line.rpartition(": ")[0]


def _memory_growth(looks: list[Look]) -> int:
    return min(one.memory for one in looks[-2:]) - looks[0].memory


if __name__ == "__main__":
    sys.exit(main())
