"""The pictures that the model learns: fetched from the package registry, drawn at 32 x 32, kept in one atlas.

Only training needs this module's `fetch` and `draw` (npm, and resvg-py from the development group); reading the atlas
needs Pillow alone.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
ATLAS = HERE / "atlas.png"
SOURCE = "@iconify-json/fluent-emoji-flat@1.2.6"
"""npm package of the drawings, at the version the shipped weights were trained with."""


@dataclass(frozen=True)
class Selection:
    """Which pictures the model knows, in the order of the atlas.

    Attributes:
        names: slugs such as `red-heart`; their words are the captions.
        side: pixels of a picture's side.
        columns: pictures in a row of the atlas.
    """

    names: tuple[str, ...]
    side: int
    columns: int

    @classmethod
    def load(cls) -> Selection:
        """Read the list that ships beside this module."""
        data = json.loads((HERE / "pictures.json").read_text())
        return cls(names=tuple(data["pictures"]), side=data["side"], columns=data["columns"])

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Where picture `index` lies in the atlas: left, top, right, bottom in pixels."""
        row, column = divmod(index, self.columns)
        return (
            column * self.side,
            row * self.side,
            (column + 1) * self.side,
            (row + 1) * self.side,
        )


def read_atlas(selection: Selection) -> list[Image.Image]:
    """Cut the shipped atlas into its RGB pictures."""
    with Image.open(ATLAS) as atlas:
        whole = atlas.convert("RGB")
    return [whole.crop(selection.box(index)) for index in range(len(selection.names))]


def write_atlas(selection: Selection, pictures: list[Image.Image], path: Path = ATLAS) -> None:
    """Lay the pictures out on one white PNG."""
    rows = -(-len(pictures) // selection.columns)
    whole = Image.new("RGB", (selection.columns * selection.side, rows * selection.side), "white")
    for index, picture in enumerate(pictures):
        whole.paste(picture, selection.box(index))
    whole.save(path, optimize=True)


def fetch(folder: Path) -> Path:
    """Have npm download the drawings into `folder`, unless they are there.

    Returns:
        The file of all SVG bodies.

    Raises:
        subprocess.CalledProcessError: npm failed.
        FileNotFoundError: npm is not installed.
    """
    icons = folder / "icons.json"
    if not icons.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        packed = subprocess.run(
            ["npm", "pack", "--silent", SOURCE],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.split()[-1]
        with tarfile.open(folder / packed) as archive:
            body = archive.extractfile("package/icons.json")
            assert body is not None
            icons.write_bytes(body.read())
    return icons


def draw(icons: Path, selection: Selection) -> list[Image.Image]:
    """Draw the selected pictures on white, `side` x `side`, RGB.

    Raises:
        KeyError: a selected picture is not in the file.
    """
    import resvg_py  # of the development group: only training draws

    data: dict[str, Any] = json.loads(icons.read_text())
    grid_width, grid_height = data.get("width", 32), data.get("height", 32)
    pictures: list[Image.Image] = []
    for name in selection.names:
        icon = data["icons"][name]
        width, height = icon.get("width", grid_width), icon.get("height", grid_height)
        svg = f'<svg viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = bytes(
            resvg_py.svg_to_bytes(
                svg_string=svg,
                width=selection.side,
                height=selection.side,
                background="#ffffff",
                skip_system_fonts=True,
            )
        )
        with Image.open(io.BytesIO(png)) as image:
            pictures.append(image.convert("RGB").resize((selection.side, selection.side)))
    return pictures
