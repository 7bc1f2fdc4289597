"""What a picture file says of how it was made: written by the image runner, read by `mlxsup show`.

The settings are one JSON object: `prompt`, `seed`, `steps`, `width`, `height`, `model`, `program`, `version`, and where they
had a meaning `negative_prompt`, `guidance` and `strength`. A second, human text says the same as other tools read it.

| | settings | human text |
|---|---|---|
| PNG | iTXt `mlxsup` | text `parameters` |
| EXIF (of JPEG, WebP and PNG) | MakerNote, behind `mlxsup` and a zero byte | UserComment |

An EXIF block holds 64 KiB in a JPEG: longer prompts are cut there, which `cut: true` tells. Pillow is imported on use.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from mlxsup._version import __version__

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

KEY = "mlxsup"
"""The PNG keyword of the settings; `program` in them says it too."""

READABLE = ("PNG", "JPEG", "WEBP")

_HUMAN_KEY = "parameters"
_MAKER_PREFIX = KEY.encode() + b"\0"
_UTF16_PREFIX = b"UNICODE\0"
_SOFTWARE, _EXIF_IFD, _MAKER_NOTE, _USER_COMMENT = 0x0131, 0x8769, 0x927C, 0x9286
_MOST_EXIF = 65_000
_CUT_PROMPT = 2000
"""Characters of each prompt that are left where a block is too small: escaped and as UTF-16, they fit in any case."""

_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error)
"""What Pillow raises for files that are broken, according to where they are."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one picture was made; None is what had no meaning for it."""

    prompt: str
    negative_prompt: str = ""
    seed: int
    steps: int
    guidance: float | None = None
    strength: float | None = None
    width: int
    height: int
    model: str

    def mapping(self) -> dict[str, Any]:
        """Return them as they are written, with the program and its version."""
        return {**msgspec.to_builtins(self), "program": "mlxsup", "version": __version__}


def png_text(settings: Settings) -> PngInfo:
    """Return the text chunks, for Pillow's `pnginfo`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, _json(settings.mapping()))
    info.add_text(_HUMAN_KEY, human_text(settings))
    return info


def exif_block(settings: Settings) -> bytes:
    """Return the EXIF block, for Pillow's `exif`; short enough for every kind of file."""
    block = _exif(settings.mapping(), settings)
    if len(block) <= _MOST_EXIF:
        return block
    cut = msgspec.structs.replace(
        settings, prompt=settings.prompt[:_CUT_PROMPT], negative_prompt=settings.negative_prompt[:_CUT_PROMPT]
    )
    return _exif({**cut.mapping(), "cut": True}, cut)


def human_text(settings: Settings) -> str:
    """Return the settings as Stable Diffusion's web UI writes and reads them: the prompts, then one line of `key: value`."""
    facts = {
        "Steps": str(settings.steps),
        "CFG scale": None if settings.guidance is None else f"{settings.guidance:g}",
        "Seed": str(settings.seed),
        "Size": f"{settings.width}x{settings.height}",
        "Model": settings.model,
        "Denoising strength": None if settings.strength is None else f"{settings.strength:g}",
        "Version": f"mlxsup {__version__}",
    }
    lines = [settings.prompt.replace("\0", " ")]
    if settings.negative_prompt:
        lines.append("Negative prompt: " + settings.negative_prompt.replace("\0", " "))
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read how a picture was made.

    Returns:
        The settings as they were written; None when the picture carries none of ours.

    Raises:
        ValueError: it is no PNG, JPEG or WebP picture; the message says why in one line, without the path.
        OSError: it cannot be read.
        ImportError: Pillow is not installed.
    """
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, for sizes and broken EXIF: no pixel is decoded here
        try:
            with Image.open(file, formats=READABLE) as picture:
                return _settings_in(picture)
        except UnidentifiedImageError:
            raise ValueError("neither PNG, JPEG nor WebP") from None
        except (*_UNREADABLE, Image.DecompressionBombError) as error:
            raise ValueError(" ".join(f"it cannot be read: {error}".split())) from error


def _settings_in(picture: Image.Image) -> dict[str, Any] | None:
    written = picture.info.get(KEY)
    if isinstance(written, str) and (found := _mapping(written.encode())):
        return found
    with suppress(*_UNREADABLE):  # broken EXIF is none
        note = picture.getexif().get_ifd(_EXIF_IFD).get(_MAKER_NOTE)
        if isinstance(note, bytes) and note.startswith(_MAKER_PREFIX):
            return _mapping(note.removeprefix(_MAKER_PREFIX))
    return None


def _mapping(text: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None if it is none, for anybody may write under our key."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _json(found: Mapping[str, Any]) -> str:
    return orjson.dumps(found).decode()


def _exif(found: Mapping[str, Any], settings: Settings) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif.endian = ">"  # a UserComment's UTF-16 is in the order of the whole block, and most readers expect this one
    exif[_SOFTWARE] = f"mlxsup {__version__}"
    details = exif.get_ifd(_EXIF_IFD)
    details[_MAKER_NOTE] = _MAKER_PREFIX + _json(found).encode()
    details[_USER_COMMENT] = _UTF16_PREFIX + human_text(settings).encode("utf-16-be")
    return exif.tobytes()


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value
