"""Compute rotary position embeddings in numpy, as timm's ``get_embed`` does.

The angle of a pair of a head's channels at a patch is ``row * frequency_row + column * frequency_column``: axial
embeddings (EVA02, DINOv3, Perception Encoder, arXiv 2104.09864) have one of the two frequencies at zero, mixed ones
(arXiv 2403.13298) neither. A traced computation leaves Tile, Range and If nodes, which TensorRT treats badly
(NVIDIA/TensorRT#4558).
"""

from __future__ import annotations

import numpy as np

from phreg_deploy.spec import Rotary


def rotary_table(rotary: Rotary, frequencies: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the sines and cosines of every patch of a grid, ``(2, L, H, Hp * Wp, D / 2)`` float32.

    Args:
        frequencies: ``(2, L, H, D / 2)``, radians per unit of the row and of the column coordinate.
    """
    rows, columns = (coordinates(rotary, axis, grid[axis]) for axis in (0, 1))
    down, across = frequencies.astype(np.float64)[:, :, :, None, None, :]
    angles = rows[:, None, None] * down + columns[:, None] * across  # (L, H, Hp, Wp, D / 2)
    angles = angles.reshape(*frequencies.shape[1:3], -1, frequencies.shape[3])
    return np.stack([np.sin(angles), np.cos(angles)]).astype(np.float32)


def coordinates(rotary: Rotary, axis: int, count: int) -> np.ndarray:
    """Return the coordinate of each of ``count`` patches along axis 0 (rows) or 1 (columns), float64."""
    places = np.arange(count, dtype=np.float64) + rotary.offset
    if rotary.coordinates == "centered":
        return 2 * (places + 0.5) / count - 1
    return places if rotary.reference is None else places * (rotary.reference[axis] / count)
