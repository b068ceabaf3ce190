"""Accept images from callers: paths, encoded bytes, files, Pillow images and arrays, alone or in lists.

``single_pictures`` makes a flat list of them and refuses everything else; ``rgb`` converts one entry to RGB.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from phreg_deploy.arguments import refuse_url
from phreg_deploy.errors import PhregError
from phreg_deploy.images.decoding import read_image, to_rgb, upright
from phreg_deploy.images.nv12 import Nv12Frame

COLORS = ("rgb", "bgr")
# kDLCPU, kDLCUDA and kDLCUDAManaged of dlpack.h.
CPU, GPU, MANAGED = 1, 2, 13
EXPECTED = "a path, encoded bytes, a binary file, a PIL image, an Nv12Frame, or uint8 (H, W, 3), (H, W) or (B, H, W, 3)"


def check_color(color: str) -> str:
    """Return ``color``. Raises ``PhregError`` if it is not in ``COLORS``."""
    if color not in COLORS:
        raise PhregError(f"color: got {color!r}, expected {' or '.join(COLORS)}.")
    return color


def single_pictures(images: Any) -> list[Any]:
    """List the pictures one by one, in order, as ``rgb`` takes them; arrays on a GPU stay as they are.

    Args:
        images: one picture, an array of several, or a list, tuple or generator of these.

    Raises:
        PhregError: no picture, something else than a picture, or an array that is not uint8 of a known shape.
    """
    if isinstance(images, (list, tuple)) or (isinstance(images, Iterator) and not hasattr(images, "read")):
        parts = list(images)
        if not parts:
            raise PhregError("extract: got an empty list, expected at least one image.")
        if len(parts) == 1:
            return _pictures(parts[0], "image")
        names = [f"image {i + 1} of {len(parts)}" for i in range(len(parts))]
        return [picture for part, name in zip(parts, names) for picture in _pictures(part, name)]
    return _pictures(images, "image")


def single_picture(image: Any, what: str) -> Any:
    """Return the only picture of a value of ``single_pictures``. Raises ``PhregError`` for several."""
    pictures = single_pictures(image)
    if len(pictures) != 1:
        raise PhregError(f"{what}: got {len(pictures)} images, expected one. Call the extractor with several.")
    return pictures[0]


def rgb(picture: Any, exif: bool, whole: bool = False) -> Image.Image | np.ndarray:
    """Convert an entry of ``single_pictures`` to an RGB image, or uint8 ``(H, W, 3)`` in its own channel order.

    Args:
        exif: turn files and Pillow images upright by their EXIF orientation.
        whole: see ``read_image``.

    Raises:
        PhregError: an array on a GPU, or a picture that cannot be decoded.
    """
    if isinstance(picture, Nv12Frame):
        return Image.fromarray(_on_host(picture).rgb())
    if on_gpu(picture):
        _refuse_gpu("image")
    if isinstance(picture, np.ndarray):
        return to_rgb(Image.fromarray(picture)) if picture.ndim == 2 else picture
    if isinstance(picture, Image.Image):
        try:
            # Pillow decodes on first use.
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise PhregError(f"image: the PIL image cannot be decoded ({error}); expected a whole one.") from None
        return to_rgb(upright(picture) if exif else picture)
    if isinstance(picture, bytes):
        return read_image(io.BytesIO(picture), exif, "the encoded image", whole)
    return read_image(picture, exif, whole=whole)


def host_array(value: Any, what: str = "image") -> np.ndarray | None:
    """Convert an array in the host's memory to numpy; return None for anything that is no array.

    Arrays of other libraries are read through ``__array__`` or DLPack, without an import of these libraries.

    Raises:
        PhregError: an array on a GPU, a masked array, or one that numpy cannot hold.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise PhregError(f"{what}: got a masked array, expected a plain one. Fill it first: array.filled(0).")
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (Image.Image, np.generic)) or not (
        hasattr(value, "__array__") or hasattr(value, "__dlpack__")
    ):
        return None
    if on_gpu(value):
        _refuse_gpu(what)
    try:
        return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        kind = type(value).__name__
        raise PhregError(f"{what}: got a {kind} that numpy cannot read ({error}); expected uint8.") from None


def on_gpu(value: Any) -> bool:
    """Whether a value is an array on a GPU, of any library, or an ``Nv12Frame`` of such arrays."""
    if isinstance(value, Nv12Frame):
        return on_gpu(value.y)
    if isinstance(value, np.ndarray):
        return False
    # DLPack first: torch raises for __cuda_array_interface__ of a tensor that requires a gradient.
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) in (GPU, MANAGED)
    return hasattr(value, "__cuda_array_interface__")


def _refuse_gpu(what: str) -> NoReturn:
    raise PhregError(
        f"{what}: got an array on a GPU, expected one in the host's memory. Call the extractor itself with it, or copy "
        "it to the host."
    )


def _on_host(frame: Nv12Frame) -> Nv12Frame:
    """The frame with numpy's planes. Raises ``PhregError`` for planes that are no arrays in the host's memory."""
    luma, pairs = (host_array(plane, "NV12") for plane in (frame.y, frame.uv))
    if luma is None or pairs is None:
        got = f"{type(frame.y).__name__} and {type(frame.uv).__name__}"
        raise PhregError(f"NV12: got y and uv as {got}, expected uint8 arrays.")
    return replace(frame, y=luma, uv=pairs)


def _pictures(value: Any, what: str) -> list[Any]:
    if value is None:
        raise PhregError(f"{what}: got None; a camera read that failed gives None. Check the frame first.")
    if isinstance(value, (str, os.PathLike)):
        refuse_url(os.fsdecode(value))
        return [Path(value)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [_encoded(bytes(value), what)]
    if isinstance(value, (Image.Image, Nv12Frame)) or on_gpu(value):
        return [value]
    if hasattr(value, "read"):
        data = value.read()
        if not isinstance(data, bytes):
            raise PhregError(f"{what}: got a file that is open as text, expected one open for bytes: open(path, 'rb').")
        return [_encoded(data, what)]
    array = host_array(value, what)
    if array is None:
        raise PhregError(f"{what}: got {type(value).__name__}, expected {EXPECTED}.")
    return _planes(array, what)


def _encoded(data: bytes, what: str) -> bytes:
    if not data:
        raise PhregError(f"{what}: got no bytes, expected an encoded image (JPEG, PNG, ...). Is the file at its end?")
    return data


def _planes(array: np.ndarray, what: str) -> list[np.ndarray]:
    """List the images in an array, each ``(H, W, 3)`` or grey ``(H, W)``."""
    shape, got = array.shape, f"{what}: got an array of {array.dtype} {array.shape}"
    if array.dtype == object:
        raise PhregError(f"{got}, expected uint8. Hand images of several sizes over as a list.")
    if array.dtype != np.uint8:
        hint = " If its values are 0-1: (255 * array).round().astype('uint8')." if array.dtype.kind == "f" else ""
        raise PhregError(f"{got}, expected uint8 with values 0-255.{hint}")
    if 0 in shape:
        raise PhregError(f"{got}, which holds no pixel; expected at least one. A camera without a frame may give this.")
    if len(shape) == 4 and shape[3] in (1, 3) and not (shape[1] == 3 and shape[2] > 3):
        return [image for part in array for image in _planes(part, what)]
    if len(shape) == 2:
        return [array]
    if len(shape) == 3 and shape[2] == 1:
        return [array[..., 0]]
    first = shape[-3] if len(shape) in (3, 4) else 0
    if first == 3 and shape[-2] > 3 and shape[-1] == 3:
        raise PhregError(f"{got}, which may be (3, H, W) as well as (H, W, 3); expected an image of another size.")
    if len(shape) == 3 and shape[2] == 3:
        return [array]
    if first in (1, 3):
        axes = "1, 2, 0" if len(shape) == 3 else "0, 2, 3, 1"
        raise PhregError(f"{got}, channels first; expected channels last. Turn it: array.transpose({axes}).")
    if shape[-1] == 4 and len(shape) in (3, 4):
        raise PhregError(f"{got}, four channels; expected three. Drop alpha: array[..., :3].")
    raise PhregError(f"{got}, expected (H, W, 3), (H, W) or (B, H, W, 3).")
