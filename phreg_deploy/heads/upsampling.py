"""Enlarge maps bilinearly, as PyTorch's ``interpolate(mode="bilinear", align_corners=False)`` does."""

from __future__ import annotations

import functools

import numpy as np


def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ``maps`` ``(B, Hp, Wp, K)`` to ``(B, H, W, K)``, float32.

    Args:
        size: (H, W). A side that is smaller than the map's is interpolated without antialiasing.
    """
    down, across = weights(maps.shape[1], size[0]), weights(maps.shape[2], size[1])
    count, _, columns, channels = maps.shape
    tall = np.matmul(down, maps.reshape(count, maps.shape[1], -1).astype(np.float32, copy=False))
    return np.matmul(across, tall.reshape(count, size[0], columns, channels))


@functools.lru_cache(maxsize=32)
def weights(old: int, new: int) -> np.ndarray:
    """Return the weights of each of ``old`` positions in each of ``new`` ones, float32 ``(new, old)``."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    below = np.minimum(place.astype(int), max(old - 2, 0))
    above, part = np.minimum(below + 1, old - 1), place - below
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), below), 1 - part)
    np.add.at(matrix, (np.arange(new), above), part)
    matrix.setflags(write=False)
    return matrix
