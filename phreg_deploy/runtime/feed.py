"""Build the inputs of a bundle's graph from a batch of images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import host_array
from phreg_deploy.runtime.positions import resample
from phreg_deploy.runtime.rotary import rotary_table
from phreg_deploy.spec import check_multiple

# Grids whose position embeddings are in the cache; the least recently used is dropped first.
MAX_GRIDS = 16
# Bytes of rotary tables in the cache, at most; one table is always kept.
MOST_BYTES = 1 << 28


class InputFeed:
    """Builds the inputs of a bundle's graph. Several threads may call it.

    The graph of a bundle with several sizes takes the position embeddings as inputs, which are computed once per size.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self._base = bundle.positions() if "pos_embed" in self.manifest.inputs else None
        self._frequencies = bundle.frequencies() if "rotary" in self.manifest.inputs else None
        # The cache needs no lock of ours, which a fork could leave locked in the child.
        self._tables = functools.lru_cache(self._grids())(self._compute)

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        """``image`` and, for several sizes, ``pos_embed`` and ``rotary``, for uint8 RGB images ``(B, H, W, 3)``.

        Raises:
            PhregError: another kind of array, or a size or batch that the bundle does not serve.
        """
        batch = check_batch(batch)
        self.check(batch.shape)
        return {"image": batch, **self.others((batch.shape[1], batch.shape[2]))}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ``PhregError`` unless the bundle serves batches of this shape ``(B, H, W, 3)``."""
        self.manifest.sizes.check((shape[1], shape[2]), self.manifest.model.patch)
        self.manifest.batches.check(shape[0])

    def others(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The inputs beside the images that the graph has, float32.

        ``pos_embed`` ``(1, Hp * Wp, C)``, ``rotary`` ``(2, L, H, Hp * Wp, D / 2)``.
        """
        return dict(self._tables(size))

    def _grids(self) -> int:
        """How many grids the cache holds: fewer where every layer and head has a table of its own."""
        rotary, patch = self.manifest.rotary, self.manifest.model.patch
        if rotary is None:
            return MAX_GRIDS
        patches = max((h // patch[0]) * (w // patch[1]) for h, w in self.manifest.sizes.sizes)
        return max(1, min(MAX_GRIDS, MOST_BYTES // (8 * rotary.layers * rotary.heads * rotary.pairs * patches)))

    def _compute(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        patch, rotary, tables = self.manifest.model.patch, self.manifest.rotary, {}
        check_multiple(size, patch)
        grid = (size[0] // patch[0], size[1] // patch[1])
        if self._base is not None:
            tables["pos_embed"] = resample(self._base, grid)
        if self._frequencies is not None and rotary is not None:
            tables["rotary"] = rotary_table(rotary, self._frequencies, grid)
        return tables


def pad_batch(batch: np.ndarray, lowest: int) -> np.ndarray:
    """Fill a batch up to ``lowest`` images with copies of its last one."""
    missing = lowest - len(batch)
    return batch if missing <= 0 else np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])


def check_batch(batch: Any) -> np.ndarray:
    """The array of a batch on the host, uint8 ``(B, H, W, 3)``.

    Raises:
        PhregError: anything else.
    """
    array = host_array(batch, "extract")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        got = type(batch).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise PhregError(f"extract: got {got}, expected a uint8 RGB array (B, H, W, 3) with B at least 1.")
    return array
