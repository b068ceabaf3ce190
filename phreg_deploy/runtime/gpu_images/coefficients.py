"""The weights of Pillow's resize, as the integers that it sums with.

The source is ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's src/libImaging/Resample.c, and for
"nearest" ``ImagingScaleAffine`` of Geometry.c.
"""

from __future__ import annotations

import functools

import numpy as np
import PIL

from phreg_deploy.images.resampling import BITS, KERNELS


def _linear(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1 - x, 0.0)


@functools.lru_cache(maxsize=64)
def weight_table(old: int, new: int, start: int, stop: int, interpolation: str) -> np.ndarray:
    """The table of one pass, int32 ``(2 + taps, stop - start)``: first input, inputs, and their weights times 2**22.

    Args:
        old, new: pixels along the axis before and after the resize.
        start, stop: the outputs to compute, of ``new``.
    """
    if old == new:
        return _single(np.arange(start, stop))
    scale = old / new
    if interpolation == "nearest":
        # Pillow adds up the places, which rounds differently from a product.
        steps = np.full(new, scale)
        steps[0] = 0.5 * scale
        return _single(np.cumsum(steps).astype(int)[start:stop])
    kernel, support = (_linear, 1) if interpolation == "bilinear" else KERNELS[interpolation]
    stretch = max(scale, 1.0)
    centres = (np.arange(start, stop) + 0.5) * scale
    lows = np.maximum(0, (centres - support * stretch + 0.5).astype(int))
    counts = np.minimum(old, (centres + support * stretch + 0.5).astype(int)) - lows
    taps = np.arange(counts.max())[:, None]
    weights = kernel(np.abs((taps + lows - centres + 0.5) * (1 / stretch))) * (taps < counts)
    # One after the other, as in C; numpy's sum adds in pairs.
    weights /= np.cumsum(weights, axis=0)[-1]
    whole = np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights))
    return np.concatenate([[lows], [counts], whole]).astype(np.int32)


def _single(places: np.ndarray) -> np.ndarray:
    return np.array([places, np.ones_like(places), np.full_like(places, 1 << BITS)], np.int32)


def height_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes the height before the width; both are (width, height).

    Pillow 13 does where the height loses more than twice as many pixels as the width. Its two orders differ by a grey
    level. Found by comparison with the bytes of Pillow 10.4, 12.3 and 13.0 (``tests/test_gpu_images.py``).
    """
    lost = old[1] - new[1]
    return int(PIL.__version__.split(".")[0]) >= 13 and lost > 0 and lost > 2 * (old[0] - new[0])
