"""Opening of picture files, which may come from anywhere, and the content of those that are written."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

# PIL knows dozens of formats by content, whatever a file's name is. Some of them start other programs: PostScript runs
# an interpreter. So every format that is opened is named.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 2**26  # of one picture; a file of a few kilobytes can unpack to gigabytes


def open_picture(source: Path | BinaryIO) -> Image.Image:
    """The picture as a person sees it, in RGB: turned as its EXIF data say, on white where it is transparent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line; no picture of FORMATS, a broken or truncated file, a picture with more than MAX_PIXELS, or
            an animation.
    """
    if isinstance(source, Path) and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("not a readable picture: a folder or a device")  # a pipe would be waited for
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, at most {MAX_PIXELS} are read")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG with its preview
                raise ValueError(f"an animation of {image.n_frames} frames")
            return _as_seen(image)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"not a readable picture: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a broken file raises nearly anything
        raise ValueError(f"not a readable picture: {' '.join((str(error) or repr(error)).split())}") from error


def _as_seen(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # grey in 16 bit, of which PIL's own conversion would keep the lowest values
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """The content of a PNG file that carries texts, {name: text}."""
    content, info = io.BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()
