"""Shift and flip images, and re-align the features of such views with the patch grid (arXiv 2505.21501 section 3.1).

Shifts are whole patches, so re-aligning never interpolates. V views, (Hp, Wp) grid of patches, C width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from phreg_deploy.errors import PhregError

# Largest shift, as a share of the side; the paper's table 4 is flat above 0.10.
SHIFT = 0.15
# Offsets that are drawn; those farthest apart are kept, as in the paper's code.
POOL = 100
# The paper fills the gap with white.
WHITE = 255


@dataclass(frozen=True)
class View:
    """Move the content up by ``down`` and left by ``right`` patches, then mirror it if ``flip``."""

    down: int
    right: int
    flip: bool


def most_views(grid: tuple[int, int]) -> int:
    """Count the different views of a grid (Hp, Wp): every shift within reach, plain and mirrored."""
    return 2 * int(np.prod(2 * _reach(grid) + 1))


def check_views(count: int, grid: tuple[int, int]) -> None:
    """Raise ``PhregError`` if a grid (Hp, Wp) has fewer than ``count`` different views."""
    most = most_views(grid)
    if count > most:
        raise PhregError(
            f"views: got {count}, but on a grid of {grid[0]} x {grid[1]} patches only {most} views differ; give at "
            f"most {most}, or use larger images."
        )


def draw_views(count: int, grid: tuple[int, int], seed: int) -> list[View]:
    """Draw ``count`` different views of a grid (Hp, Wp), at most ``most_views(grid)``.

    The first is the identity. The others have offsets of farthest-point sampling, each mirrored with p = 0.5. If there
    are fewer offsets than views, the same offsets follow, mirrored the other way.
    """
    check_views(count, grid)
    rng, reach = np.random.default_rng(seed), _reach(grid)
    pool = rng.integers(-reach, reach + 1, size=(POOL, 2))
    chosen = np.zeros((1, 2), dtype=int)
    # The pool may lack offsets; the second array ``(O, 2)`` holds every one within reach.
    for offsets in (pool, np.indices(tuple(2 * reach + 1)).reshape(2, -1).T - reach):
        while len(chosen) < count:
            distance = ((offsets[:, None] - chosen[None]) ** 2).sum(-1).min(1)
            if distance.max() == 0:
                break
            chosen = np.vstack([chosen, offsets[distance.argmax()]])
    flips = rng.random(count) < 0.5
    views = [View(int(y), int(x), bool(f) and i > 0) for i, ((y, x), f) in enumerate(zip(chosen, flips))]
    return (views + [replace(view, flip=not view.flip) for view in views])[:count]


def _reach(grid: tuple[int, int]) -> np.ndarray:
    """Return the largest shift along each axis, in whole patches, at least one."""
    return np.maximum(1, np.rint(SHIFT * np.asarray(grid))).astype(int)


def _spans(offset: int, size: int) -> tuple[slice, slice]:
    """Return source and destination along one axis for content that moves by -offset."""
    start, stop = max(0, offset), min(size, size + offset)
    return slice(start, stop), slice(start - offset, stop - offset)


def show(image: np.ndarray, view: View, patch: tuple[int, int]) -> np.ndarray:
    """Return the view of a uint8 image ``(H, W, 3)``, with the gap in white."""
    (from_y, to_y), (from_x, to_x) = (_spans(o * p, s) for o, p, s in zip((view.down, view.right), patch, image.shape))
    shown = np.full_like(image, WHITE)
    shown[to_y, to_x] = image[from_y, from_x]
    return shown[:, ::-1] if view.flip else shown


def realign(features: np.ndarray, view: View) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Re-align a view's features ``(Hp, Wp, C)``: return their valid part, and its place in the grid."""
    features = features[:, ::-1] if view.flip else features
    valid, place = way_back(view, features.shape)
    return features[valid], place


def way_back(view: View, grid: Sequence[int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where the valid part of a view is in its own map (Hp, Wp, ...), mirrored back, and in the grid."""
    (to_y, from_y), (to_x, from_x) = (_spans(o, s) for o, s in zip((view.down, view.right), grid))
    return (from_y, from_x), (to_y, to_x)


def gather(maps: np.ndarray, views: list[View]) -> tuple[np.ndarray, np.ndarray]:
    """Add up the feature maps ``(V, Hp, Wp, C)`` of views at their places, and count the views per patch."""
    total, count = np.zeros_like(maps[0]), np.zeros(maps.shape[1:3], dtype=np.float32)
    for features, view in zip(maps, views):
        part, place = realign(features, view)
        total[place] += part
        count[place] += 1
    return total, count


def seed_of(seed: int, digest: str) -> int:
    """Return the seed of one image's views, which does not depend on the other images."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "little")
