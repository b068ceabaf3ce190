"""Pillow's resize as products of matrices, for large images: the same numbers in a third to half of the time.

Both passes of Pillow's resize are linear: each output pixel is a weighted sum of neighbouring input pixels. A block of
neighbouring outputs reads one window of inputs, so that BLAS computes the block as one small product. The first pass is
rounded to whole grey levels before the second, as in Pillow. Pillow sums in whole numbers and this module in float32, so
that about one value in 10,000 differs, by one grey level or two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

LEAST = 1 << 19  # pixels of the source; below, Pillow is as fast
STRIP = 64  # rows of the source that are in float32 at once
BLOCK = 8  # outputs a product; more outputs read a wider window, fewer leave BLAS too little work
BITS = 22  # of the fraction of Pillow's weights


def _cubic(x: np.ndarray) -> np.ndarray:
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # a = -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


Kernel = tuple[Callable[[np.ndarray], np.ndarray], int]
# The kernel and its support, by name; bilinear is no faster this way.
KERNELS: dict[str, Kernel] = {"bicubic": (_cubic, 2), "lanczos": (_lanczos, 3)}


def applies(old: tuple[int, int], new: tuple[int, int], interpolation: str) -> bool:
    """Whether ``shrink`` serves this resize and is the faster way; ``old`` and ``new`` are (width, height)."""
    halves = 2 * new[0] <= old[0] and 2 * new[1] <= old[1]
    return interpolation in KERNELS and old[0] * old[1] >= LEAST and halves


def shrink(
    image: Image.Image | np.ndarray, new: tuple[int, int], box: tuple[int, int, int, int], interpolation: str
) -> np.ndarray:
    """Part of an RGB image that was resized: uint8, (bottom - top, right - left, 3).

    Args:
        image: an RGB picture, or uint8 ``(H, W, 3)``.
        new: (width, height) of the whole image after the resize.
        box: (left, top, right, bottom) of the part to compute, in pixels of the resized image.
    """
    array = isinstance(image, np.ndarray)
    width, height = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
    left, top, right, bottom = box
    across = _blocks(width, new[0], left, right, interpolation)
    down = _blocks(height, new[1], top, bottom, interpolation)
    first, last = down[0][0], down[-1][0] + len(down[-1][1])  # rows that the second pass reads
    rows = np.empty((3, last - first, right - left), np.float32)
    for start in range(first, last, STRIP):
        stop = min(start + STRIP, last)
        part = image[start:stop] if array else np.asarray(image.crop((0, start, width, stop)))  # type: ignore[union-attr,index]
        # One product for all channels.
        planes = part.transpose(2, 0, 1).astype(np.float32, order="C").reshape(-1, width)
        rows[:, start - first : stop - first] = _round(_products(planes, across)).reshape(3, stop - start, -1)
    whole = [np.matmul(weights.T, rows[:, begin - first :][:, : len(weights)]) for begin, weights in down]
    return _round(np.concatenate(whole, axis=1)).astype(np.uint8).transpose(1, 2, 0).copy()


def _products(planes: np.ndarray, blocks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    out = np.empty((len(planes), sum(weights.shape[1] for _, weights in blocks)), np.float32)
    place = 0
    for begin, weights in blocks:
        np.matmul(planes[:, begin : begin + len(weights)], weights, out=out[:, place : place + weights.shape[1]])
        place += weights.shape[1]
    return out


def _round(values: np.ndarray) -> np.ndarray:
    """Whole grey levels, in place."""
    values += 0.5
    np.floor(values, out=values)
    return np.clip(values, 0, 255, out=values)


@functools.lru_cache(maxsize=16)
def _blocks(old: int, new: int, start: int, stop: int, interpolation: str) -> list[tuple[int, np.ndarray]]:
    """For each block of outputs from ``start`` to ``stop``: where its window begins, and its weights (window, outputs).

    The weights are those of Pillow's ``precompute_coeffs``.
    """
    kernel, support = KERNELS[interpolation]
    scale = old / new
    found = []
    for begin in range(start, stop, BLOCK):
        centres = (np.arange(begin, min(begin + BLOCK, stop)) + 0.5) * scale
        lows = np.maximum(0, (centres - support * scale + 0.5).astype(int))
        highs = np.minimum(old, (centres + support * scale + 0.5).astype(int))
        places = np.arange(lows[0], highs[-1])[:, None]
        weights = kernel(np.abs(places - centres + 0.5) / scale) * ((places >= lows) & (places < highs))
        weights = np.rint(weights / weights.sum(0) * (1 << BITS)) / (1 << BITS)
        found.append((int(lows[0]), np.ascontiguousarray(weights, dtype=np.float32)))
    return found
