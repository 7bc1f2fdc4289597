"""`mlxsup show`: how a picture was made, from what its file says of itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import Any

from mlxsup.cli.failures import FAILED, OK, not_installed, say
from mlxsup.cli.options import Json
from mlxsup.cli.pictures import expanded
from mlxsup.cli.streams import json_line


def show(picture: Path, /, *more: Path, json: Json = False) -> int:
    """Tell how a picture was made: its prompt, seed and settings, as its file has them.

    Args:
        picture: A PNG, WebP or JPEG file; one without settings is told of, and makes the exit code 1.
        more: Further ones.
        json: Print a line of JSON for each picture, `{"picture": ..., "settings": ...}`; null where there are none.
    """
    return max(_show(path, as_json=json, title=bool(more)) for path in (picture, *more))


def _show(path: Path, *, as_json: bool, title: bool) -> int:
    """Show one picture; what is wrong with it is told, and does not keep the next one from being shown."""
    try:
        from mlxsup.metadata import read_settings

        settings = read_settings(expanded(path))
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    except OSError as error:
        return _failed(f"{path} cannot be read: {error.strerror or error}")
    except ValueError as error:
        return _failed(f"{path} is no picture: {error}")
    if as_json:
        sys.stdout.write(json_line({"picture": str(path), "settings": settings}))
    if settings is None:
        return _failed(f"{path} has no settings in it")
    if not as_json:
        sys.stdout.writelines(f"{line}\n" for line in _lines(settings, str(path) if title else ""))
    return OK


def _failed(why: str) -> int:
    say(_plain(why))
    return FAILED


def _lines(settings: Mapping[str, Any], title: str) -> Iterator[str]:
    if title:
        yield _plain(title)
    indent = "  " if title else ""
    names = {name: _plain(name) for name in settings}
    width = max(map(len, names.values()), default=0)
    for name, value in settings.items():
        text = value if isinstance(value, str) else dumps(value, ensure_ascii=False)
        yield f"{indent}{names[name]:{width}}  {_plain(text)}"


def _plain(text: str) -> str:
    """Write what is no printable character as an escape: a file from elsewhere could hold commands to the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
