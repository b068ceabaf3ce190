"""Lay overlapping windows over an image, and weigh their patches so that the weights sum to one everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import pad
from phreg_deploy.spec import Preprocess

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Where the windows of one image lie. All but ``size`` and ``patch``, in pixels, are in patches.

    ``grid``: the image's patches (Hp, Wp); the last row and column may be partly outside. ``rows``, ``columns``: the
    first patch of each window along each axis; the windows are all pairs, row by row.
    """

    size: Pair
    patch: Pair
    grid: Pair
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def over(cls, image: Pair, size: Pair, stride: Pair, patch: Pair) -> Windows:
        """Cover an image of (height, width) pixels by as few windows as the stride allows, spread evenly.

        ``stride``: the largest step between windows in pixels; steps are whole patches.
        """
        grid = (math.ceil(image[0] / patch[0]), math.ceil(image[1] / patch[1]))
        rows, columns = (_starts(n, side // p, step // p) for n, side, step, p in zip(grid, size, stride, patch))
        return cls(size, patch, grid, rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Pair]:
        """The first (row, column) of each window."""
        return ((row, column) for row in self.rows for column in self.columns)

    @property
    def shape(self) -> Pair:
        """Patches (rows, columns) of a window."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The weights of each window's rows and columns, float32 ``(windows, patches)`` for each axis.

        A patch's weight is the product of both; over all windows, a patch's weights sum to one. They follow a Hann
        window, sin², sampled at the patches' centres, so that a window's border counts least.
        """
        return (
            _weights(self.rows, self.shape[0], self.grid[0]),
            _weights(self.columns, self.shape[1], self.grid[1]),
        )

    def inside(self, start: Pair) -> tuple[slice, slice]:
        """The part of the grid that the window at ``start`` covers; it ends at the grid's end."""
        ends = [min(first + side, n) for first, side, n in zip(start, self.shape, self.grid)]
        return slice(start[0], ends[0]), slice(start[1], ends[1])


def check_stride(stride: Pair, size: Pair, patch: Pair) -> None:
    """Raise ``PhregError`` unless ``stride`` is from one patch to the whole window, along each axis."""
    if not all(p <= step <= side for p, step, side in zip(patch, stride, size)):
        raise PhregError(
            f"stride: got {stride[0]}x{stride[1]}, expected from a patch, {patch[0]}x{patch[1]}, to the window, "
            f"{size[0]}x{size[1]}; half the window by default."
        )


def cut(
    image: Image.Image | np.ndarray, windows: Windows, start: Pair, preprocess: Preprocess, bgr: bool
) -> np.ndarray:
    """Cut out the window at ``start``: uint8 RGB ``(H, W, 3)``.

    Where it reaches beyond the image, begun patches repeat the last row and column, and the rest is the mean colour.
    """
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    (h, w), (ph, pw) = windows.size, windows.patch
    top, left = start[0] * ph, start[1] * pw
    bottom, right = min(top + h, height), min(left + w, width)
    if isinstance(image, Image.Image):
        part = np.asarray(image.crop((left, top, right, bottom)))
    else:
        part = image[top:bottom, left:right]
    part = part[..., ::-1] if bgr else part
    if part.shape[:2] == (h, w):
        return part
    begun = ((0, (top - bottom) % ph), (0, (left - right) % pw), (0, 0))
    return pad(np.pad(part, begun, mode="edge"), windows.size, preprocess)


def _starts(patches: int, window: int, step: int) -> tuple[int, ...]:
    """Spread windows evenly over an axis of ``patches``; the last one ends with it, if one window is not enough."""
    room = max(0, patches - window)
    steps = math.ceil(room / step)
    return tuple(i * room // steps for i in range(steps + 1)) if steps else (0,)


def _weights(starts: tuple[int, ...], window: int, patches: int) -> np.ndarray:
    rise = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    total = np.zeros(max(patches, window))
    for start in starts:
        total[start : start + window] += rise
    return np.stack([rise / total[start : start + window] for start in starts]).astype(np.float32)
