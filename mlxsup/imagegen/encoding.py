"""From a picture to the bytes of its file. Slow for large pictures: never called on the event loop."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxsup import metadata
from mlxsup.protocol import OutputFormat

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_QUALITY = 90
"""Of jpeg and webp, where none is asked for."""

_FULL_COLOUR = 90
"""From this quality on a jpeg keeps the colour of every pixel, below that of every four."""


@dataclass(frozen=True)
class Output:
    """What the caller wants to get.

    Attributes:
        format: kind of file, of the picture and of its previews.
        quality: 0 to 100, for jpeg and webp; png is lossless.
        metadata: whether the picture says how it was made. Previews never do.
        previews: how many pictures of the work in progress, at most.
    """

    format: OutputFormat = "png"
    quality: int = DEFAULT_QUALITY
    metadata: bool = True
    previews: int = 0


def encode(picture: Image.Image, output: Output, settings: metadata.Settings | None = None) -> str:
    """Return the picture file in base64, as the wire carries it, with these settings written into it."""
    file = io.BytesIO()
    about = {} if settings is None else {"exif": metadata.exif_block(settings)}
    match output.format:
        case "png":
            text = None if settings is None else metadata.png_text(settings)
            picture.save(file, "PNG", pnginfo=text, **about)
        case "webp":
            picture.save(file, "WEBP", quality=output.quality, **about)
        case "jpeg":
            subsampling = "4:4:4" if output.quality >= _FULL_COLOUR else "4:2:0"
            picture.save(file, "JPEG", quality=output.quality, subsampling=subsampling, **about)
    return base64.b64encode(file.getbuffer()).decode("ascii")
