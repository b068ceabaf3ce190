"""Nodes that enlarge a map of patches: each answer is a weighted mean over the 3 x 3 patches around it.

B batch, (Hp, Wp) patch grid, P answers of a patch, K channels. The weights are constants (bilinear), or follow from the
image's colours (joint bilateral, ``images.upsampling``). MatMul, Slice, Concat, Softmax, Reshape and Transpose are all
that it takes, at sizes that are fixed or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phreg_deploy.bundle.heads import JOINT_BILATERAL
from phreg_deploy.images.upsampling import COLOUR, bilinear, spatial

COLOURS = 3
AXIS = np.array([3], np.int64)
# From and to of a Slice: the two ends of a side, and the three places of a padded one.
ENDS = {"first": (0, 1), "last": (-1, sys.maxsize)}
SHIFTS = ((0, -2), (1, -1), (2, sys.maxsize))


@dataclass(frozen=True)
class Upsampler:
    """Writes the nodes.

    ``node(kind, name, *sources, **attributes)`` and ``constant(name, value)`` add to the graph, and return a name.
    ``patch``: (height, width) in pixels. ``cells``: how many answers (down, across) a patch has.
    """

    node: Callable[..., str]
    constant: Callable[[str, np.ndarray], str]
    method: str
    patch: tuple[int, int]
    cells: tuple[int, int]

    def enlarge(self, maps: str, image: str, channels: int) -> str:
        """Turn ``maps`` ``(B, Hp, Wp, K)`` of ``channels`` into ``(B, Hp, Wp, P, K)``; ``image`` uint8 RGB."""
        if self.method != JOINT_BILATERAL:
            return self.node("MatMul", "finer", self.constant("bilinear", bilinear(self.cells)), self._neighbours(maps))
        places, means = self._colours(image)
        near = self._neighbours(self.node("Concat", "with_colours", maps, means, axis=-1))
        values = self._cut("values", near, 0, channels)
        score = self._score(places, self._cut("colours", near, channels, channels + COLOURS))
        return self.node("MatMul", "finer", self.node("Softmax", "shares", score, axis=-1), values)

    def arrange(self, name: str, finer: str, channels: int) -> str:
        """Put ``finer`` ``(B, Hp, Wp, P, K)`` in its place: ``(B, Hp * down, Wp * across, K)``."""
        down, across = self.cells
        x = self._reshape(f"{name}.rows", finer, [0, 0, 0, down, across * channels])
        x = self.node("Transpose", f"{name}.by_row", x, perm=[0, 1, 3, 2, 4])
        x = self._reshape(f"{name}.wide", x, [0, 0, 0, -1, channels])
        # One side is joined at a time, since a Reshape infers one.
        x = self.node("Transpose", f"{name}.columns_first", x, perm=[0, 3, 1, 2, 4])
        x = self._reshape(f"{name}.tall", x, [0, 0, -1, channels])
        return self.node("Transpose", f"{name}.rows_first", x, perm=[0, 2, 1, 3])

    def _colours(self, image: str) -> tuple[str, str]:
        """Return the colours of each patch's places ``(B, Hp, Wp, P, 3)`` and its mean colour ``(B, Hp, Wp, 3)``."""
        height, width = self.patch
        x = self.node("Cast", "image", image, to=1)
        x = self._reshape("image.columns", x, [0, 0, -1, width * COLOURS])
        x = self.node("Transpose", "image.by_column", x, perm=[0, 2, 1, 3])
        x = self._reshape("image.patches", x, [0, 0, -1, height * width * COLOURS])
        x = self.node("Transpose", "image.by_row", x, perm=[0, 2, 1, 3])
        count = self.cells[0] * self.cells[1]
        means = self.node("MatMul", "mean_colours", x, self.constant("mean", _pooling(self.patch, (1, 1))))
        if self.cells != self.patch:
            x = self.node("MatMul", "pooled", x, self.constant("pooling", _pooling(self.patch, self.cells)))
        return self._reshape("places", x, [0, 0, 0, count, COLOURS]), means

    def _score(self, places: str, means: str) -> str:
        """Return the exponents ``(B, Hp, Wp, P, 9)``, up to what all patches of a place share."""
        factor = self.constant("factor", np.float32(1 / COLOUR**2))
        turned = self.node("Transpose", "colours.turned", means, perm=[0, 1, 2, 4, 3])
        product = self.node("MatMul", "colours.product", places, self.node("Mul", "colours.scaled", turned, factor))
        squares = self.node("Mul", "colours.squares", turned, turned)
        axis = self.constant("colour_axis", np.array([3], np.int64))
        length = self.node("ReduceSum", "colours.length", squares, axis, keepdims=1)
        half = self.constant("half", np.float32(-0.5 / COLOUR**2))
        score = self.node("Add", "colours.score", product, self.node("Mul", "colours.half", length, half))
        return self.node("Add", "score", score, self.constant("spatial", spatial(self.cells)))

    def _neighbours(self, maps: str) -> str:
        """Turn ``(B, Hp, Wp, C)`` into ``(B, Hp, Wp, 9, C)``, with the edge repeated."""
        x = maps
        for axis, name in ((1, "rows"), (2, "columns")):
            first, last = (self._slice(f"{name}.{side}", x, *ends, axis) for side, ends in ENDS.items())
            x = self.node("Concat", f"{name}.padded", first, x, last, axis=axis)
        shifted = []
        for place in range(9):
            y, across = divmod(place, 3)
            part = self._slice(f"shift{place}.rows", x, *SHIFTS[y], 1)
            part = self._slice(f"shift{place}", part, *SHIFTS[across], 2)
            shifted.append(self.node("Unsqueeze", f"shift{place}.apart", part, self.constant(f"apart{place}", AXIS)))
        return self.node("Concat", "neighbours", *shifted, axis=3)

    def _cut(self, name: str, x: str, start: int, end: int) -> str:
        return self._slice(name, x, start, end, 4)

    def _slice(self, name: str, x: str, start: int, end: int, axis: int) -> str:
        limits = (("start", start), ("end", end), ("axis", axis))
        values = [self.constant(f"{name}.{key}", np.array([value], np.int64)) for key, value in limits]
        return self.node("Slice", name, x, *values)

    def _reshape(self, name: str, x: str, shape: list[int]) -> str:
        return self.node("Reshape", name, x, self.constant(f"{name}.shape", np.array(shape, np.int64)))


def _pooling(patch: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Return the matrix of means: pixels of a patch, row by row, to ``cells``: ``(height * width * 3, P * 3)``."""
    count = cells[0] * cells[1]
    numbers = np.arange(count).reshape(cells)
    places = numbers.repeat(patch[0] // cells[0], 0).repeat(patch[1] // cells[1], 1).reshape(-1, 1)
    matrix = (places == np.arange(count)) * (count / (patch[0] * patch[1]))
    return np.kron(matrix, np.eye(COLOURS)).astype(np.float32)
