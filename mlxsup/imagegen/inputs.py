"""Pictures that a request brings along: from the bytes of a file to an upright RGB picture on white, or a clear no.

Colour profiles are not applied. At `MOST_PIXELS` decoding takes seconds and, for the while, 200 MB, of WebP 800 MB: never
on the event loop, and one at a time.
"""

from __future__ import annotations

import ctypes
import io
import sys
from typing import TYPE_CHECKING

from mlxsup.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 50_000_000
"""Pixels of a picture that is taken; what its header says counts, before anything is decoded."""

TEXT_ROOM = 16 << 20
"""Bytes of a PNG's colour profile or text, unpacked: profiles of printers and whole workflows are some megabytes."""

FORMATS = ("JPEG", "PNG", "WEBP")
_ANIMATED = ("PNG", "WEBP")
"""Not JPEG: what has several pictures there are photographs, and the first is the one that is meant."""

_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 20
_LARGE = 4_000_000
"""Pixels from which memory is given back behind a picture."""


def read_picture(data: bytes, name: str, longest: int) -> Image.Image:
    """Decode one picture file.

    Args:
        data: a JPEG, PNG or WebP file.
        name: what the request calls it, for messages.
        longest: pixels that its longer side needs at most; a larger picture is shrunk.

    Raises:
        InvalidRequest: it is none of these, is broken or cut off, has several frames, or more than `MOST_PIXELS`.
    """
    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    PngImagePlugin.MAX_TEXT_CHUNK = TEXT_ROOM  # this process is the runner's; all texts together keep Pillow's 64 MiB
    _check_webp(data, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(*picture.size, name)
            frames = getattr(picture, "n_frames", 1)
            if picture.format in _ANIMATED and frames > 1:
                raise InvalidRequest(f"{name} is animated ({frames} frames); send one picture", details=_about(name))
            large = picture.width * picture.height > _LARGE
            turned = _turned(_decoded(picture, longest), _orientation(picture))
            del picture  # and with it, all that was decoded
    except (InvalidRequest, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"{name} is no JPEG, PNG or WebP picture", details=_about(name)) from None
    except Exception as error:  # decoders raise anything there is for a broken file
        why = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequest(f"{name} is broken or cut off: {why}", details=_about(name)) from error
    turned.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    if large:
        _give_back()
    return turned


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return the whole of a picture, as large as it can be, in the middle of a white one of `width` x `height`."""
    from PIL import Image

    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    whole = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    if size == (width, height):
        return whole
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(whole, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def _check_webp(data: bytes, name: str) -> None:
    """Refuse a large WebP by its own header: Pillow's decoder makes room for it as soon as it is opened."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return
    match data[12:16]:
        case b"VP8 ":
            sides = (int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF)
        case b"VP8L":
            both = int.from_bytes(data[21:25], "little")
            sides = ((both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1)
        case b"VP8X":
            sides = (int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
        case _:
            return
    _check_size(*sides, name)


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise _too_large(name, f": {width} x {height}")


def _decoded(picture: Image.Image, longest: int) -> Image.Image:
    """Decode into RGB on white, at no more than about twice the resolution that is needed.

    It goes strip by strip, so that beside the decoded picture itself there is no other of its size.
    """
    from PIL import Image

    if picture.format in {"JPEG", "MPO"}:
        picture.draft(picture.mode, (longest, longest))
    picture.load()
    width, height = picture.size
    factor = max(1, max(width, height) // (2 * longest))
    rows = factor * max(1, _STRIP_PIXELS // (width * factor))
    whole = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        strip = _on_white(picture.crop((0, top, width, min(top + rows, height))))
        whole.paste(strip if factor == 1 else strip.reduce(factor), (0, top // factor))
    return whole


def _on_white(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):
        picture = _from_16_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    canvas = Image.new("RGB", clear.size, "white")
    canvas.paste(clear, mask=clear)
    return canvas


def _from_16_bit(picture: Image.Image) -> Image.Image:
    """Keep the upper eight bits of grey, where Pillow would cut off at 255; one value may stand for transparent."""
    levels = [value >> 8 for value in range(1 << 16)]
    clear = picture.info.get("transparency")
    if isinstance(clear, int) and 0 <= clear < len(levels):
        levels[clear] = 255
    grey = picture.convert("I").point(levels, "L")
    grey.info.pop("transparency", None)
    return grey


def _orientation(picture: Image.Image) -> int:
    """Return how the picture is turned, by EXIF; 1 where that is missing or broken, as viewers take it."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - the picture itself is fine
        return 1
    return value if isinstance(value, int) else 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    ways = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(ways[orientation]) if orientation in ways else picture


def _give_back() -> None:
    """Have glibc return freed memory to the system: of large pictures it otherwise keeps a few hundred megabytes for good."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _too_large(name: str, size: str = "") -> InvalidRequest:
    most = f"{MOST_PIXELS // 1_000_000} megapixels"
    return InvalidRequest(f"{name} has more than {most}{size}; send a smaller one", details=_about(name))


def _about(name: str) -> dict[str, str]:
    return {"param": name}
