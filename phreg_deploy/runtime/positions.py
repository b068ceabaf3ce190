"""Resample position embeddings in numpy, by the antialiased bicubic resampling of torch that timm uses.

A traced resampling would be a Resize node, which TensorRT refuses and other runtimes compute differently.
"""

from __future__ import annotations

import numpy as np

# The coefficient of torch's antialiased bicubic and of Pillow; torch's plain bicubic has -0.75.
CUBIC = -0.5


def resample(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """``(gh, gw, C)`` -> ``(1, Hp * Wp, C)`` float32, equal to ``timm.layers.resample_abs_pos_embed``."""
    if positions.shape[:2] != tuple(grid):
        rows, columns = (_weights(old, new) for old, new in zip(positions.shape[:2], grid))
        positions = np.einsum("hi,wj,ijc->hwc", rows, columns, positions.astype(np.float64), optimize=True)
    return np.ascontiguousarray(positions.reshape(1, -1, positions.shape[-1]), dtype=np.float32)


def _weights(old: int, new: int) -> np.ndarray:
    """The matrix ``(new, old)`` of one axis: a cubic kernel, wider for shrinking; each row sums to one."""
    scale = old / new
    widen = max(scale, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = scale * (i + 0.5)
        first, last = max(int(centre - 2 * widen + 0.5), 0), min(int(centre + 2 * widen + 0.5), old)
        row = _cubic((np.arange(first, last) - centre + 0.5) / widen)
        weights[i, first:last] = row / row.sum()
    return weights


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near, far = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1, CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
