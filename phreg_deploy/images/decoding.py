"""Decode image files and Pillow images of any mode to 8-bit RGB, upright if requested, with a limit on their size."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import is_regular

# What Pillow raises for damaged EXIF.
DAMAGED = (struct.error, SyntaxError, ValueError, TypeError, KeyError)
# Pixels above which a JPEG is decoded at half, a quarter or an eighth of its sides.
GIANT = 1 << 25
# Pixels of a side: Pillow keeps 8 bytes for each row, and the weights of a resize take 32 bytes for each pixel.
LARGEST_SIDE = 1 << 22
# Formats for which Pillow runs another program (Ghostscript).
PROGRAMS = ("EPS",)
# Rows of 16-bit grey that are converted at once.
STRIP = 256


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to 8-bit RGB: 16-bit grey is divided by 257, alpha is dropped as in timm, CMYK converted.

    Raises ``PhregError`` for an image without pixels, or of a mode without a scale (32-bit integers or floats).
    """
    if 0 in image.size:
        raise PhregError(f"image: got a picture of {image.size[0]}x{image.size[1]} pixels, expected at least one.")
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "F":
        raise PhregError("image: got 32-bit float pixels (mode 'F') of unknown scale; expected 8-bit or 16-bit pixels.")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow warns of a direct conversion, though its result is the same.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey ``(H, W)`` of any integer type -> uint8. Raises ``PhregError`` for values outside 0-65535."""
    if grey.min() < 0 or grey.max() > 65535:
        got = f"mode {mode!r} with values up to {grey.max()}"
        raise PhregError(f"image: got {got}, expected 16-bit grey (0-65535) or 8-bit pixels.")
    out = np.empty(grey.shape, np.uint8)
    # In strips: float64 of a whole image of Pillow's largest size takes gigabytes.
    for row in range(0, len(grey), STRIP):
        out[row : row + STRIP] = grey[row : row + STRIP] / 257 + 0.5
    return out


def upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; leave it unchanged without one, or with a damaged one."""
    with contextlib.suppress(*DAMAGED):
        return ImageOps.exif_transpose(image)
    return image


def is_turned(jpeg: Image.Image) -> bool:
    """Whether ``upright`` swaps width and height of a JPEG; no pixel is decoded."""
    with contextlib.suppress(*DAMAGED):
        return jpeg.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False


def read_image(
    source: Path | str | IO[bytes], exif: bool = False, name: str | None = None, whole: bool = False
) -> Image.Image:
    """Read an image file as RGB.

    Args:
        source: a path, or a binary file that Pillow can seek in.
        exif: turn the image upright by its EXIF orientation.
        name: the name in messages; by default the path.
        whole: decode giant JPEGs with all their pixels too.

    Raises ``PhregError`` if the file is missing, a folder, a pipe, empty, truncated, too large, or no image.
    """
    name = name or str(source)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        raise PhregError(f"image: {name} is a folder; expected an image file.")
    try:
        if isinstance(source, (str, Path)) and not is_regular(source):
            raise PhregError(f"image: {name} is a pipe or a device; expected an image file.")
        with Image.open(source) as image:
            _bound(image, name, whole)
            image.load()
            return to_rgb(upright(image) if exif else image)
    except FileNotFoundError:
        raise PhregError(f"image: there is no file {name}.") from None
    except UnidentifiedImageError:
        kind = "empty" if _is_empty(source) else "not an image that Pillow can read"
        raise PhregError(f"image: {name} is {kind}; expected JPEG, PNG, WebP, TIFF or BMP.") from None
    # ``Image.open`` raises these, before ``_bound``.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except PermissionError as error:
        raise PhregError(f"image: {name} cannot be read ({error.strerror}); allow yourself to read it.") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise PhregError(f"image: {name} cannot be read ({error}); it is truncated or damaged. Replace it.") from None


def _bound(image: Image.Image, name: str, whole: bool) -> None:
    """Decode a giant JPEG at a smaller scale unless ``whole``; refuse an image that is still above Pillow's limit."""
    if image.format in PROGRAMS:
        raise PhregError(f"image: {name} is {image.format}, which another program reads; expected JPEG, PNG or TIFF.")
    width, height = image.size
    if image.format == "JPEG" and not whole:
        divisor = next((d for d in (1, 2, 4, 8) if width * height <= GIANT * d * d), 8)
        if divisor > 1:
            image.draft(None, (width // divisor, height // divisor))
    if max(width, height) > LARGEST_SIDE:
        raise PhregError(f"image: {name} has {width}x{height} pixels, too long and narrow; cut it into parts.")
    if Image.MAX_IMAGE_PIXELS is not None and image.size[0] * image.size[1] > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{width}x{height}, ")


def _too_large(name: str, size: str = "") -> PhregError:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return PhregError(
        f"image: {name} is too large ({size}more than {limit:.0f} megapixels); it is not damaged. Make it smaller, or "
        "set PIL.Image.MAX_IMAGE_PIXELS."
    )


def _is_empty(source: Path | str | IO[bytes]) -> bool:
    if isinstance(source, (str, Path)):
        return Path(source).stat().st_size == 0
    return source.seek(0, 2) == 0
