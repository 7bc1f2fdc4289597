"""The picture files that come out: their kinds, their quality, and what they say of themselves."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from mlxsup import __version__
from mlxsup.imagegen.builtin.model import SIDE
from mlxsup.metadata import read_settings
from tests.imagegen.conftest import Child
from tests.imagegen.test_inputs import saved

pytestmark = pytest.mark.anyio
KINDS = [
    ({}, "PNG"),
    ({"output_format": "png"}, "PNG"),
    ({"output_format": "webp"}, "WEBP"),
    ({"output_format": "jpeg"}, "JPEG"),
]
ORDER = {"prompt": "a red héart 😀", "steps": 2, "seed": 7, "width": 2 * SIDE, "height": SIDE}


async def made(runner: Child, **order: Any) -> bytes:
    return base64.b64decode((await runner.complete(**order))[-1]["image"])


async def said(data: bytes, folder: Path) -> dict[str, Any] | None:
    """What the picture says of itself."""
    (folder / "picture").write_bytes(data)
    return await anyio.to_thread.run_sync(read_settings, folder / "picture")


@pytest.mark.parametrize(("asked", "kind"), KINDS)
async def test_its_kind_is_the_one_asked_for_and_it_says_how_it_was_made(
    runner: Child, tmp_path: Path, asked: dict[str, str], kind: str
) -> None:
    data = await made(runner, **ORDER, **asked)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size, picture.mode) == (kind, (2 * SIDE, SIDE), "RGB")
    assert await said(data, tmp_path) == {
        **ORDER,
        "guidance": 1.0,
        "model": "builtin:emoji",
        "program": "mlxsup",
        "version": __version__,
    }


@pytest.mark.parametrize(("asked", "kind"), KINDS)
async def test_it_says_nothing_when_that_is_asked_for(
    runner: Child, tmp_path: Path, asked: dict[str, str], kind: str
) -> None:
    data = await made(runner, **ORDER, **asked, metadata=False)
    assert await said(data, tmp_path) is None
    assert not [
        word for word in (b"mlxsup", b"heart", b"h\xc3\xa9art", b"Exif", b"EXIF", b"tEXt", b"iTXt") if word in data
    ]


@pytest.mark.parametrize(("asked", "kind"), KINDS)
async def test_previews_say_nothing_either(runner: Child, asked: dict[str, str], kind: str) -> None:
    lines = await runner.complete(**ORDER, **asked, previews=1)
    (preview,) = [base64.b64decode(line["image"]) for line in lines if line.get("preview")]
    assert not [word for word in (b"mlxsup", b"Exif", b"EXIF", b"tEXt", b"iTXt") if word in preview]


async def test_an_edited_picture_tells_its_strength(runner: Child, tmp_path: Path) -> None:
    images = [base64.b64encode(saved(Image.new("RGB", (9, 9)), "PNG")).decode()]
    data = await made(runner, **ORDER, images=images, strength=0.25)
    assert (await said(data, tmp_path) or {})["strength"] == 0.25


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
async def test_quality_costs_bytes(runner: Child, kind: str) -> None:
    order = {**ORDER, "width": 256, "height": 256, "output_format": kind, "metadata": False}
    sizes = [len(await made(runner, **order, output_compression=quality)) for quality in (0, 50, 100)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert 2 * sizes[0] < sizes[2]
    usual = len(await made(runner, **order))
    assert sizes[1] < usual < sizes[2]


async def test_a_long_prompt_fits_into_every_kind(runner: Child, tmp_path: Path) -> None:
    for kind in ("png", "webp", "jpeg"):
        data = await made(runner, **{**ORDER, "prompt": "sun " * 50_000}, output_format=kind)
        assert (await said(data, tmp_path) or {})["prompt"].startswith("sun sun")


async def test_the_same_order_gives_the_same_bytes(runner: Child) -> None:
    for kind in ("png", "webp", "jpeg"):
        assert await made(runner, **ORDER, output_format=kind) == await made(runner, **ORDER, output_format=kind)


async def test_pixels_do_not_depend_on_what_is_said(runner: Child) -> None:
    one, other = [Image.open(io.BytesIO(await made(runner, **ORDER, metadata=tell))) for tell in (True, False)]
    assert one.tobytes() == other.tobytes()
