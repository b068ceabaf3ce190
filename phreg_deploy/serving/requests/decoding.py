"""Decode an uploaded image within bounds: the header first, then the pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from phreg_deploy.errors import PhregError
from phreg_deploy.images.decoding import is_turned, read_image
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.serving.requests.refusals import Refused

# Formats that are decoded. Others of Pillow's run other programs (EPS) or are rarely fuzzed.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# The longest side of the picture that an overlay is drawn over.
LONGEST = 2048


@dataclass(frozen=True)
class Upload:
    """A decoded image.

    ``image`` uint8 RGB ``(H, W, 3)``: the model's input. ``mask`` bool ``(Hp, Wp)``: patches that are image, or None.
    ``size``: (height, width) of the upright image. ``picture``: that image, at most ``LONGEST`` pixels long, or None.
    """

    image: np.ndarray
    mask: np.ndarray | None
    size: tuple[int, int]
    picture: Image.Image | None


def decode(
    data: bytes,
    extractor: FeatureExtractor,
    pixels: int,
    *,
    size: tuple[int, int] | None = None,
    fit: str | None = None,
    picture: bool = False,
) -> Upload:
    """Decode an image and fit it to the model's input, as the extractor does with encoded bytes.

    Args:
        pixels: most pixels that the header may promise.
        size, fit: as in a call of ``FeatureExtractor``.
        picture: keep the picture too.

    Raises:
        Refused: 413 for too many pixels; 422 for a size that is not served, another format, or a damaged file.
    """
    if not data:
        raise Refused(422, f"image: got no bytes, expected an encoded image: {_listed()}.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            if header.width * header.height > pixels:
                raise _too_many_pixels(f"{header.width}x{header.height}", pixels)
            whole = read_image(io.BytesIO(data), extractor.preprocess.exif, "the image")
            upright_size = _upright_size(header, whole, extractor.preprocess.exif)
        fitted = extractor.fitted(whole, size, fit=fit)
        shown = _small(whole) if picture else None
    # Pillow refuses such a header itself.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("far more", pixels) from None
    except UnidentifiedImageError:
        raise Refused(422, f"image: got {len(data)} bytes that are no image; expected {_listed()}.") from None
    except Refused:
        raise
    except PhregError as error:
        raise Refused(422, str(error)) from None
    # Decoders raise nearly anything for damaged files; whatever it is, this upload caused it.
    except Exception as error:
        raise Refused(
            422, f"image: it cannot be decoded ({type(error).__name__}: {error}); it is damaged. Send a whole one."
        ) from None
    return Upload(fitted.image, fitted.mask, upright_size, shown)


def _too_many_pixels(got: str, limit: int) -> Refused:
    return Refused(413, f"image: got {got} pixels, expected at most {limit / 1e6:g} megapixels. Make it smaller.")


def _upright_size(header: Image.Image, decoded: Image.Image, exif: bool) -> tuple[int, int]:
    """Return (height, width) of the whole image; ``decoded`` is smaller than that where a JPEG is giant."""
    if decoded.width * decoded.height >= header.width * header.height:
        return decoded.height, decoded.width
    width, height = header.size
    return (width, height) if exif and is_turned(header) else (height, width)


def _small(image: Image.Image) -> Image.Image:
    scale = LONGEST / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _listed() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
