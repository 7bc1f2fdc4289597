"""The pictures that the model learns: fetched from the package registry, drawn at 64 x 64, kept in one atlas.

Only training needs this module's `fetch` and `draw` (npm, and resvg-py from the development group); reading the atlas
needs Pillow alone.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mlxsup.imagegen.builtin.recolour import Tint, base_name, recoloured

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
        tints: the colours by name in which the model has seen what has a colour at all.
        kept_out: pairs of a colour and a name that it has never seen.
    """

    names: tuple[str, ...]
    side: int
    columns: int
    tints: dict[str, Tint]
    kept_out: tuple[tuple[str, str], ...]

    @classmethod
    def load(cls) -> Selection:
        """Read the list that ships beside this module."""
        data = json.loads((HERE / "pictures.json").read_text())
        return cls(
            names=tuple(data["pictures"]),
            side=data["side"],
            columns=data["columns"],
            tints={name: tuple(tint) for name, tint in data["colours"].items()},
            kept_out=tuple((colour, name) for colour, name in data["kept_out"]),
        )

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


@dataclass(frozen=True)
class Drawings:
    """Pictures and their captions: those that were selected, in their order, then some of them in other colours."""

    pictures: list[Image.Image]
    captions: list[str]


def draw(icons: Path, selection: Selection, *, kept_out: bool = False) -> Drawings:
    """Draw the selected pictures on white, `side` x `side`, RGB, each of them in every colour that it can have.

    A name that exists is not made a second time: `black-cat` is the drawing of that name. The pairs that are kept out
    come only with `kept_out`, and then nothing else.

    Raises:
        KeyError: a selected picture is not in the file.
    """
    data: dict[str, Any] = json.loads(icons.read_text())
    grid = data.get("width", 32), data.get("height", 32)
    wanted = set(selection.kept_out)
    pictures, captions = [], []
    others: list[tuple[str, str]] = []
    taken = set(selection.names)
    for name in selection.names:
        icon = data["icons"][name]
        width, height = icon.get("width", grid[0]), icon.get("height", grid[1])
        frame = f'<svg viewBox="0 0 {width} {height}">', "</svg>"
        picture = _drawn(icon["body"].join(frame), selection.side)
        pictures.append(picture)
        captions.append(name)
        base = base_name(name, selection.tints)
        if "face" in name or (base != name and base in taken):
            continue
        taken.add(base)
        for colour, tint in selection.tints.items():
            if f"{colour}-{base}" in selection.names or ((colour, base) in wanted) != kept_out:
                continue
            if body := recoloured(icon["body"], picture, tint):
                others.append((f"{colour}-{base}", body.join(frame)))
    if kept_out:
        pictures, captions = [], []
    with ThreadPoolExecutor() as pool:
        pictures += pool.map(lambda other: _drawn(other[1], selection.side), others)
    return Drawings(pictures, captions + [caption for caption, _ in others])


def _drawn(svg: str, side: int) -> Image.Image:
    import resvg_py  # of the development group: only training draws

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB").resize((side, side))
