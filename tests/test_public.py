"""What the package shows, costs and keeps to itself."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxsup

PACKAGE = Path(mlxsup.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("aiohttp", "structlog", "rich", "psutil")
LINES = 500


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded when it has run this."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_it_loads_nothing_heavy() -> None:
    loaded = modules_after("import mlxsup")
    assert "mlxsup" in loaded
    assert not loaded & {*HEAVY, "asyncio", "msgspec", "anyio", "uvloop", "cyclopts"}


def test_naming_the_supervisor_loads_nothing_heavy() -> None:
    assert not modules_after("from mlxsup import CompletionRequest, MlxsupError, Settings, Supervisor") & set(HEAVY)


@pytest.mark.parametrize("module", ["mlxsup.supervisor", "mlxsup.runners.runner", "mlxsup.testing", "mlxsup.engines"])
def test_the_library_never_loads_the_server_the_command_line_or_a_model(module: str) -> None:
    rooms = ("mlxsup.api", "mlxsup.cli", "mlxsup.daemon", "mlxsup.imagegen", "mlx.core", "PIL.Image")
    assert not [name for name in modules_after(f"import {module}") if name.startswith(rooms)]


@pytest.mark.parametrize("name", mlxsup.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mlxsup, name) is not None
    assert name in dir(mlxsup)


def test_they_can_all_be_imported_at_once() -> None:
    found: dict[str, object] = {}
    exec("from mlxsup import *", found)
    assert set(mlxsup.__all__) <= set(found)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        mlxsup.nothing  # noqa: B018 - asking is what is tested
    with pytest.raises(ImportError):
        exec("from mlxsup import nothing")


def test_its_version_is_the_one_of_its_distribution() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", mlxsup.__version__)


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    """Each name is bound for type checkers by an import of its own."""
    text = (PACKAGE / "__init__.py").read_text()
    block = text.partition("if TYPE_CHECKING:")[2].partition("\n\n")[0]
    typed = {
        name.strip() for line in block.splitlines() if "import" in line for name in line.split("import")[1].split(",")
    }
    assert typed | {"__version__"} == set(mlxsup.__all__)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_go(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= LINES


def test_one_room_alone_starts_processes() -> None:
    assert _using(r"create_subprocess_(?:exec|shell)\(") == {"runners/process.py"}


def test_nobody_forks_behind_its_back() -> None:
    programs = {"testing/fake_runner.py", "imagegen/builtin/train.py"}  # which run by themselves, never in a supervisor
    assert _using(r"os\.(?:system|popen|fork|posix_spawn\w*|exec\w+)\(|subprocess\.Popen\(") <= programs


def _using(what: str) -> set[str]:
    return {str(path.relative_to(PACKAGE)) for path in SOURCES if re.search(what, path.read_text())}


def test_nothing_goes_through_a_shell() -> None:
    assert _using(r"shell\s*=\s*True") == set()


def test_every_module_says_what_it_is_for() -> None:
    for source in SOURCES:
        if source.name != "__init__.py" or source.read_text().strip():
            name = ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            if name.startswith(("mlxsup.imagegen", "mlxsup.testing.fake_runner")) or name.endswith("__main__"):
                continue  # needs an extra, or is a program
            assert importlib.import_module(name).__doc__, name
