"""The package as a whole: what it imports, what it ships, how it is laid out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlxsup

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path for room in ("mlxsup", "tests") for path in (ROOT / room).rglob("*.py"))


def test_importing_mlxsup_loads_nothing_heavy() -> None:
    code = "import sys, mlxsup; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"aiohttp", "cyclopts", "mlx", "numpy", "PIL", "psutil", "rich", "structlog"}
    assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)


def test_every_public_name_is_there() -> None:
    assert {name: getattr(mlxsup, name, None) is not None for name in mlxsup.__all__} == dict.fromkeys(
        mlxsup.__all__, True
    )
    assert sorted(mlxsup.__all__) == mlxsup.__all__


def test_the_types_are_announced() -> None:
    assert (ROOT / "mlxsup" / "py.typed").is_file()


@pytest.mark.parametrize("extra", ["imagegen", "mflux", "mlx-lm", "nvidia"])
def test_the_extras_are_there(extra: str) -> None:
    assert PROJECT["optional-dependencies"][extra]


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", PROJECT["license-files"])
def test_the_licences_are_there(path: str) -> None:
    assert "Permission is hereby granted" in (ROOT / path).read_text()
