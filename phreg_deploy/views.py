"""Shifted and flipped views of an image, and the way back into its patch grid (arXiv 2505.21501 section 3.1).

Shifts are whole patches, so the way back is an index and never an interpolation. B batch, V views, (Hp, Wp) grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from phreg_deploy.errors import PhregError

SHIFT = 0.15  # of the side; the paper's table 4 is flat above 0.10
POOL = 100  # offsets drawn, of which the farthest apart are kept, as in the paper's code
WHITE = 255  # the paper fills the gap with white


@dataclass(frozen=True)
class View:
    """Content moves up by ``down`` and left by ``right`` patches, then is mirrored where ``flip``."""

    down: int
    right: int
    flip: bool


def most_views(grid: tuple[int, int]) -> int:
    """How many views of a grid (Hp, Wp) differ: every shift within reach, as it is and mirrored."""
    return 2 * int(np.prod(2 * _reach(grid) + 1))


def check_views(count: int, grid: tuple[int, int]) -> None:
    """Raise ``PhregError`` where a grid (Hp, Wp) has fewer than ``count`` different views."""
    if count > most_views(grid):
        raise PhregError(
            f"views: got {count}, but on a grid of {grid[0]} x {grid[1]} patches only {most_views(grid)} views differ; "
            f"give at most {most_views(grid)}, or use larger images."
        )


def draw_views(count: int, grid: tuple[int, int], seed: int) -> list[View]:
    """``count`` different views: the identity first, then offsets chosen by farthest-point sampling, each flipped with p = 0.5.

    Where there are fewer offsets than views, the list goes on with the same offsets flipped the other way.

    Args:
        count: at most ``most_views(grid)``.
        grid: (Hp, Wp). The largest shift is ``SHIFT`` of each side, rounded to whole patches and at least one.
    """
    check_views(count, grid)
    rng, reach = np.random.default_rng(seed), _reach(grid)
    pool = rng.integers(-reach, reach + 1, size=(POOL, 2))
    chosen = np.zeros((1, 2), dtype=int)
    for offsets in (pool, _lattice(reach)):  # the pool is a sample and may lack some
        while len(chosen) < count:
            distance = ((offsets[:, None] - chosen[None]) ** 2).sum(-1).min(1)
            if distance.max() == 0:
                break
            chosen = np.vstack([chosen, offsets[distance.argmax()]])
    flips = rng.random(count) < 0.5
    views = [View(int(y), int(x), bool(f) and i > 0) for i, ((y, x), f) in enumerate(zip(chosen, flips))]
    return (views + [replace(view, flip=not view.flip) for view in views])[:count]


def _reach(grid: tuple[int, int]) -> np.ndarray:
    """Largest shift along each axis, in patches."""
    return np.maximum(1, np.rint(SHIFT * np.asarray(grid))).astype(int)


def _lattice(reach: np.ndarray) -> np.ndarray:
    """Every offset within ``reach``, ``(O, 2)``."""
    return np.indices(tuple(2 * reach + 1)).reshape(2, -1).T - reach


def _spans(offset: int, size: int) -> tuple[slice, slice]:
    """Source and destination along one axis for content that moves by -offset."""
    start, stop = max(0, offset), min(size, size + offset)
    return slice(start, stop), slice(start - offset, stop - offset)


def show(image: np.ndarray, view: View, patch: tuple[int, int]) -> np.ndarray:
    """The uint8 image ``(H, W, 3)`` as ``view`` shows it, the gap filled with white."""
    (from_y, to_y), (from_x, to_x) = (_spans(o * p, s) for o, p, s in zip((view.down, view.right), patch, image.shape))
    shown = np.full_like(image, WHITE)
    shown[to_y, to_x] = image[from_y, from_x]
    return shown[:, ::-1] if view.flip else shown


def realign(features: np.ndarray, view: View) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Features ``(Hp, Wp, C)`` of a view back at their places: the valid part, and where it goes in the grid."""
    features = features[:, ::-1] if view.flip else features
    valid, place = way_back(view, features.shape)
    return features[valid], place


def way_back(view: View, grid: Sequence[int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the valid part of a view lies in its own map of (Hp, Wp, ...), mirrored back where it was flipped, and where it goes in the grid."""
    (to_y, from_y), (to_x, from_x) = (_spans(o, s) for o, s in zip((view.down, view.right), grid))
    return (from_y, from_x), (to_y, to_x)


def gather(maps: np.ndarray, views: list[View]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of re-aligned feature maps ``(V, Hp, Wp, C)`` at their places, and how many views cover each patch."""
    total, count = np.zeros_like(maps[0]), np.zeros(maps.shape[1:3], dtype=np.float32)
    for features, view in zip(maps, views):
        part, place = realign(features, view)
        total[place] += part
        count[place] += 1
    return total, count


def seed_of(seed: int, digest: str) -> int:
    """A seed for one image's views: order and company of the images do not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "little")
