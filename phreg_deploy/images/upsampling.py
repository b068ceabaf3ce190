"""Enlarge maps of patches, by place alone or by the colours of the image too.

Bilinear enlargement is that of PyTorch's ``interpolate(mode="bilinear", align_corners=False)``. Joint bilateral
upsampling is that of Kopf, Cohen, Lischinski and Uyttendaele (SIGGRAPH 2007), over the 3 x 3 nearest patches: a patch
counts by a Gaussian of its distance, times a Gaussian of the difference between its mean colour and the colour of the
place. ``onnx_graph.upsampling`` writes both as nodes of a graph.
"""

from __future__ import annotations

import functools

import numpy as np

# Deviations of the two Gaussians: in patches, and in levels of 8-bit RGB (Euclidean). Chosen on the drive
# 0006R0 of CamVid's training images with ViT-Tiny and DeiT-Tiny (docs/figures.md, "Finer maps").
SPATIAL, COLOUR = 0.5, 25.5


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


def joint_bilateral(maps: np.ndarray, image: np.ndarray, stride: int) -> np.ndarray:
    """Enlarge ``maps`` ``(B, Hp, Wp, K)`` by the colours of ``image``, uint8 RGB ``(B, H, W, 3)``.

    Returns:
        ``(B, H / stride, W / stride, K)`` float32.
    """
    batch, rows, columns, channels = maps.shape
    down, across = image.shape[1] // rows // stride, image.shape[2] // columns // stride
    shape = (batch, rows, down, stride, columns, across, stride, 3)
    colours = image.reshape(shape).mean((3, 6), dtype=np.float32)
    places = colours.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, down * across, 3)
    near = neighbours(np.concatenate([maps.astype(np.float32, copy=False), places.mean(3)], -1))
    values, means = near[..., :channels], near[..., channels:]
    score = places @ means.swapaxes(-1, -2) - (means**2).sum(-1)[..., None, :] / 2
    score = score / np.float32(COLOUR**2) + spatial((down, across))
    share = np.exp(score - score.max(-1, keepdims=True))
    mixed = (share / share.sum(-1, keepdims=True)) @ values
    mixed = mixed.reshape(batch, rows, columns, down, across, channels).transpose(0, 1, 3, 2, 4, 5)
    return mixed.reshape(batch, rows * down, columns * across, channels)


def neighbours(maps: np.ndarray) -> np.ndarray:
    """Gather the 3 x 3 patches around each: ``(B, Hp, Wp, C)`` to ``(B, Hp, Wp, 9, C)``; the edge is repeated."""
    wide = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = maps.shape[1:3]
    return np.stack([wide[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3)], 3)


def spatial(cells: tuple[int, int]) -> np.ndarray:
    """Return the exponents of 9 patches at each of ``cells`` (down, across) of the middle: ``(cells, 9)``."""
    sides = []
    for count in cells:
        place = (np.arange(count) + 0.5) / count - 0.5
        sides.append(-((place[:, None] - np.array([-1, 0, 1])) ** 2) / (2 * SPATIAL**2))
    both = sides[0][:, None, :, None] + sides[1][None, :, None, :]
    return both.reshape(-1, 9).astype(np.float32)


def bilinear(cells: tuple[int, int]) -> np.ndarray:
    """Return the weight of each of 9 patches at each of ``cells`` (down, across) of the middle one: ``(cells, 9)``."""
    # Three patches, enlarged: the middle one's places.
    down, across = (weights(3, 3 * count)[count : 2 * count] for count in cells)
    return (down[:, None, :, None] * across[None, :, None, :]).reshape(-1, 9)
