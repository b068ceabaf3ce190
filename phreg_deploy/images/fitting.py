"""Fit images to a model's input size by padding, cropping or squashing, in place of the bundle's own steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import fit
from phreg_deploy.spec import Preprocess

FITS = ("pad", "crop", "squash")


@dataclass(frozen=True)
class Fitted:
    """``image``: uint8 RGB ``(H, W, 3)``. ``mask``: bool ``(Hp, Wp)``, True for patches of the image; None for all."""

    image: np.ndarray
    mask: np.ndarray | None = None


def check_fit(name: str | None) -> str | None:
    """Return ``name``. Raises ``PhregError`` unless it is in ``FITS``, or None."""
    if name is not None and name not in FITS:
        raise PhregError(f"fit: got {name!r}, expected {', '.join(FITS[:-1])} or {FITS[-1]}.")
    return name


def fit_as(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    preprocess: Preprocess,
    patch: tuple[int, int],
    name: str | None = None,
    bgr: bool = False,
) -> Fitted:
    """Fit an image to the input size (height, width).

    Args:
        image: an RGB picture, or uint8 ``(H, W, 3)``.
        name: "pad" keeps the aspect and fills the right and the bottom with the mean colour; "crop" keeps the aspect
            and cuts out the largest centre; "squash" resizes the whole image; None takes the steps of ``preprocess``.
        bgr: the array is BGR; it is turned after the resize, which treats every channel alike, on fewer pixels.

    Raises:
        PhregError: another name, or an image so long and narrow that it would take gigabytes.
    """
    old = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    inner, preprocess = fitted_steps(old, size, preprocess, name)
    array = fit(image, inner, preprocess)
    if bgr:
        array = np.ascontiguousarray(array[..., ::-1])
    if name != "pad":
        return Fitted(array)
    grid = (size[0] // patch[0], size[1] // patch[1])
    return Fitted(pad(array, size, preprocess), patch_mask(inner, grid, patch))


def fitted_steps(
    old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess, name: str | None
) -> tuple[tuple[int, int], Preprocess]:
    """How ``fit_as`` fits an image of ``old`` (width, height) pixels into ``size`` (height, width).

    Returns the (height, width) of the image within the input, and the steps to it. Raises ``PhregError`` for another
    name.
    """
    if check_fit(name) is not None:
        preprocess = replace(preprocess, crop_mode="center" if name == "crop" else "squash", crop_pct=1.0)
    return _inside(old, size) if name == "pad" else size, preprocess


def padding_colour(preprocess: Preprocess) -> np.ndarray:
    """The model's mean colour, with which "pad" fills: uint8 RGB ``(3,)``."""
    return np.rint(255 * np.array(preprocess.mean)).astype(np.uint8)


def pad(array: np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Put uint8 RGB ``(h, w, 3)`` into the top left corner of an image ``(H, W, 3)`` of the model's mean colour."""
    if array.shape[:2] == tuple(size):
        return array
    canvas = np.empty((*size, 3), np.uint8)
    canvas[:] = padding_colour(preprocess)
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas


def patch_mask(pixels: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Mark the patches of which at least half of each side lies in an image of ``pixels`` (height, width) at the top
    left; at least one row and one column. Returns bool ``grid``."""
    rows, columns = (max(1, int(side / step + 0.5)) for side, step in zip(pixels, patch))
    mask = np.zeros(grid, bool)
    mask[:rows, :columns] = True
    return mask


def _inside(old: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of an image's aspect within ``size``; at least a pixel each."""
    width, height = old
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))
