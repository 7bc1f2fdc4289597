"""Pictures made out of pictures."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from PIL import Image, ImageChops, ImageStat

from mlxsup import Supervisor
from mlxsup.config import parse
from mlxsup.engines import KEYS
from mlxsup.errors import InvalidRequest
from mlxsup.imagegen.builtin.model import SIDE
from mlxsup.imagegen.builtin.reference import Selection, read_atlas
from mlxsup.imagegen.pipelines.base import OnStep, Order, Sizes
from tests.imagegen.conftest import Child, Start
from tests.imagegen.test_inputs import saved
from tests.imagegen.test_service import Gated, serving

pytestmark = pytest.mark.anyio
EDIT: dict[str, Any] = {"prompt": "a blue heart", "steps": 8, "seed": 5, "width": 2 * SIDE, "height": 2 * SIDE}


@pytest.fixture(scope="module")
def heart() -> Image.Image:
    selection = Selection.load()
    return read_atlas(selection)[selection.names.index("red-heart")].resize((2 * SIDE, 2 * SIDE))


def wired(picture: Image.Image, kind: str = "PNG", **how: Any) -> list[str]:
    return [base64.b64encode(saved(picture, kind, **how)).decode()]


def result(lines: list[dict[str, Any]]) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(lines[-1]["image"]))) as found:
        return found.convert("RGB")


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of a level, 0 to 255."""
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return sum(means) / len(means)


class TestStrength:
    @pytest.mark.parametrize(("kind", "how"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
    async def test_none_gives_the_picture_back(
        self, runner: Child, heart: Image.Image, kind: str, how: dict[str, Any]
    ) -> None:
        lines = await runner.complete(**EDIT, images=wired(heart, kind, **how), strength=0)
        assert difference(result(lines), heart) < 6
        assert (lines[-1]["eval_count"], lines[-1]["step"]) == (0, 8)

    async def test_all_of_it_leaves_nothing_of_the_picture(self, runner: Child, heart: Image.Image) -> None:
        edited = result(await runner.complete(**EDIT, images=wired(heart), strength=1))
        assert edited.tobytes() == result(await runner.complete(**EDIT)).tobytes()

    async def test_the_more_the_further(self, runner: Child, heart: Image.Image) -> None:
        strengths = (0.2, 0.6, 1.0)
        edited = [result(await runner.complete(**EDIT, images=wired(heart), strength=each)) for each in strengths]
        apart = [difference(each, heart) for each in edited]
        assert apart == sorted(apart)
        assert apart[0] + 10 < apart[-1]

    async def test_it_is_six_tenths_when_nobody_says(self, runner: Child, heart: Image.Image) -> None:
        said, unsaid = [
            result(await runner.complete(**EDIT, images=wired(heart), **strength))
            for strength in ({"strength": 0.6}, {})
        ]
        assert said.tobytes() == unsaid.tobytes()

    async def test_that_much_of_the_steps_is_left(self, runner: Child, heart: Image.Image) -> None:
        *steps, last = await runner.complete(**EDIT, images=wired(heart), strength=0.5, previews=1)
        assert [line["step"] for line in steps] == [0, 4, 5, 6, 6, 7, 8]
        assert [line["step"] for line in steps if line.get("preview")] == [6]
        assert last["eval_count"] == 4


class TestPicture:
    async def test_all_of_a_wide_one_comes_back_on_white(self, runner: Child) -> None:
        wide = Image.new("RGB", (200, 100), (200, 30, 40))
        found = result(await runner.complete(prompt="x", images=wired(wide), strength=0))
        assert found.size == (256, 256)
        assert difference(found.crop((0, 80, 256, 176)), Image.new("RGB", (256, 96), (200, 30, 40))) < 6
        assert min(ImageStat.Stat(found.crop((0, 0, 256, 48))).mean) > 250

    async def test_it_is_turned_and_flattened(self, runner: Child) -> None:
        clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        clear.paste((255, 0, 0, 255), (0, 0, 64, 16))
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter to the right: what was on top is on the right
        images = wired(clear, "PNG", exif=exif.tobytes())
        found = result(await runner.complete(prompt="x", images=images, strength=0, width=SIDE, height=SIDE))
        assert found.getpixel((SIDE - 2, SIDE // 2)) == (255, 0, 0)
        assert found.getpixel((2, SIDE // 2)) == (255, 255, 255)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "images[0] is no JPEG, PNG or WebP picture"),
            (saved(Image.new("RGB", (99, 99)), "PNG")[:-50], "images[0] is broken or cut off: "),
            (saved(Image.new("L", (9000, 6000)), "PNG"), "images[0] has more than 50 megapixels: 9000 x 6000"),
            (
                saved(Image.new("L", (9, 9)), "PNG", save_all=True, append_images=[Image.new("L", (9, 9), 9)]),
                "images[0] is animated (2 frames)",
            ),
        ],
        ids=["nothing", "cut off", "too large", "animated"],
    )
    async def test_what_cannot_be_taken_is_refused_with_its_reason(
        self, runner: Child, data: bytes, words: str
    ) -> None:
        body = json.dumps({"prompt": "x", "images": [base64.b64encode(data).decode()]}).encode()
        status, code, message = await runner.refusal(body)
        assert (status, code) == (400, "invalid_request")
        assert message.startswith(words)


@pytest.mark.skipif(sys.platform != "linux", reason="how memory is given back is glibc's")
@pytest.mark.loops("asyncio")
async def test_a_large_picture_holds_nobody_up_and_leaves_nothing_behind(start: Start) -> None:
    child = start()
    order = {"prompt": "x", "images": wired(Image.new("I;16", (4000, 4000), 9)), "steps": 2, "strength": 0.5}
    process = psutil.Process(child.process.pid)
    await child.complete(prompt="x", steps=2)
    before = process.memory_info().rss
    times: list[float] = []
    async with anyio.create_task_group() as tasks:
        made = anyio.Event()

        async def make() -> None:
            assert (await child.complete(**order))[-1]["done"]
            made.set()

        tasks.start_soon(make)
        while not made.is_set():
            began = anyio.current_time()
            assert (await child.health())[0] == 200
            times.append(anyio.current_time() - began)
            await anyio.sleep(0.02)
    assert max(times) < 1
    assert process.memory_info().rss < before + (20 << 20)


async def test_library_callers_edit_and_are_told_what_is_wrong(heart: Image.Image) -> None:
    sup = Supervisor(parse({"models": {"emoji": {"engine": "imagegen", "path": "builtin:emoji"}}}, KEYS))
    async with sup:
        images = [saved(heart, "WEBP", lossless=True)]
        async with sup.completion("emoji", **EDIT, images=images, strength=0.0) as completion:
            last = [chunk async for chunk in completion][-1]
        with Image.open(io.BytesIO(last.image_bytes())) as found:
            assert difference(found.convert("RGB"), heart) < 6
        with pytest.raises(InvalidRequest, match=r"images\[0\] is no JPEG"):
            await anext(sup.completion("emoji", prompt="x", images=[b"hello"]))
        with pytest.raises(InvalidRequest, match="strength"):
            await anext(sup.completion("emoji", prompt="x", strength=0.5))


async def test_what_is_reserved_bounds_the_size_that_nobody_asks_for() -> None:
    entry = {"engine": "imagegen", "path": "builtin:emoji", "max_pixels": 96 * 96}
    async with Supervisor(parse({"models": {"emoji": entry}}, KEYS)) as sup:
        for width, height, size in ((None, None, (96, 96)), (None, 88, (96, 88)), (128, 72, (128, 72))):
            async with sup.completion("emoji", prompt="x", steps=1, width=width, height=height) as completion:
                last = [chunk async for chunk in completion][-1]
            with Image.open(io.BytesIO(last.image_bytes())) as found:
                assert found.size == size
        with pytest.raises(InvalidRequest, match=r"128 x 96 is more than the 9216 pixels .*; the key is max_pixels"):
            await anext(sup.completion("emoji", prompt="x", width=128))


class Taking(Gated):
    """A pipeline that notes what it is given; it takes two pictures, and knows no strength."""

    sizes = Sizes(smallest=64, multiple=16, default=512)
    honours = frozenset({"images"})
    most_images = 2

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[Order] = []

    def generate(self, order: Order, on_step: OnStep) -> Image.Image:
        self.orders.append(order)
        on_step(0, order.steps)
        return Image.new("RGB", (order.width, order.height))


async def ordered(
    folder: Path, most: int, shape: tuple[int, int] | None, asked: dict[str, int]
) -> tuple[int, str, list[Order]]:
    """Ask a runner that may make so many pixels for a picture, perhaps of one of that shape: its status, words and orders."""
    pipeline = Taking()
    order = {"prompt": "x", "images": wired(Image.new("RGB", shape, "red")) if shape else [], **asked}
    async with (
        serving(pipeline, folder, max_pixels=most) as runner,
        runner.session.post("/completion", json=order) as answer,
    ):
        return answer.status, await answer.text(), pipeline.orders


class TestPipelines:
    async def test_one_that_takes_none_refuses_them(self, tmp_path: Path) -> None:
        async with serving(Gated(), tmp_path) as runner:
            for field in ({"images": wired(Image.new("RGB", (9, 9)))}, {"strength": 0.5}):
                async with runner.session.post("/completion", json={"prompt": "x", **field}) as answer:
                    error = (await answer.json())["error"]
                assert (answer.status, error["code"]) == (400, "unsupported_parameter")
                assert next(iter(field)) in error["message"]

    @pytest.mark.parametrize(
        ("shape", "asked", "size"),
        [
            ((300, 200), {}, (512, 336)),
            ((200, 300), {}, (336, 512)),
            ((4000, 10), {}, (512, 64)),
            ((300, 200), {"width": 256}, (256, 176)),
            ((300, 200), {"height": 256}, (384, 256)),
            ((300, 200), {"width": 256, "height": 256}, (256, 256)),
        ],
    )
    async def test_the_shape_stays_unless_another_is_asked_for(
        self, tmp_path: Path, shape: tuple[int, int], asked: dict[str, int], size: tuple[int, int]
    ) -> None:
        pipeline = Taking()
        order = {"prompt": "x", "images": 2 * wired(Image.new("RGB", shape, "red")), **asked}
        async with serving(pipeline, tmp_path) as runner, runner.session.post("/completion", json=order) as answer:
            last = json.loads((await answer.read()).splitlines()[-1])
        (given,) = pipeline.orders
        assert (given.width, given.height) == size == result([last]).size
        assert [image.mode for image in given.images] == ["RGB", "RGB"]
        assert given.strength == 1.0

    @pytest.mark.parametrize(
        ("most", "shape", "asked", "size"),
        [
            (512 * 512, None, {}, (512, 512)),
            (512 * 512 - 1, None, {}, (496, 496)),
            (256 * 256, None, {}, (256, 256)),
            (256 * 256, None, {"width": 256}, (256, 256)),
            (1024 * 1024, None, {"height": 2048}, (512, 2048)),
            (256 * 256, (300, 200), {}, (256, 176)),
            (256 * 256, (4000, 10), {}, (256, 64)),
            (256 * 256, (200, 300), {"height": 256}, (176, 256)),
            (64 * 64, (10, 10), {}, (64, 64)),
        ],
    )
    async def test_a_size_that_is_left_open_fits_what_is_reserved(
        self, tmp_path: Path, most: int, shape: tuple[int, int] | None, asked: dict[str, int], size: tuple[int, int]
    ) -> None:
        status, told, orders = await ordered(tmp_path, most, shape, asked)
        assert status == 200, told
        assert [(made.width, made.height) for made in orders] == [size]

    @pytest.mark.parametrize(
        ("most", "shape", "asked", "size"),
        [
            (512 * 512, None, {"width": 512, "height": 528}, "512 x 528"),
            (256 * 256, None, {"width": 512}, "512 x 256"),
            (512 * 512, (100, 1000), {"width": 512}, "512 x 4096"),
            (512 * 512, (1000, 100), {"height": 512}, "4096 x 512"),
            (64 * 64 - 1, None, {}, "64 x 64"),
        ],
    )
    async def test_what_is_larger_than_that_is_refused(
        self, tmp_path: Path, most: int, shape: tuple[int, int] | None, asked: dict[str, int], size: str
    ) -> None:
        status, told, orders = await ordered(tmp_path, most, shape, asked)
        error = json.loads(told)["error"]
        assert (status, error["code"], orders) == (400, "invalid_request", [])
        why = f"{size} is more than the {most} pixels that memory is reserved for; the key is max_pixels"
        assert error["message"] == why

    async def test_one_more_than_it_takes_is_refused(self, tmp_path: Path) -> None:
        order = {"prompt": "x", "images": 3 * wired(Image.new("RGB", (9, 9)))}
        async with serving(Taking(), tmp_path) as runner, runner.session.post("/completion", json=order) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "invalid_request")
        assert error["message"] == "images: this model takes 2 pictures at once, not 3"
