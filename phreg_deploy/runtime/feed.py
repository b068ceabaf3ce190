"""A batch of images as the inputs of a bundle's graph."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import host_array
from phreg_deploy.runtime.positions import resample
from phreg_deploy.spec import check_multiple

GRIDS_KEPT = 16  # resampled position embeddings kept; the least recently used is dropped first


class InputFeed:
    """Builds the inputs of a bundle's graph; may be called from several threads.

    A bundle that serves several sizes takes the position embedding of each size as an input; it is resampled once per size.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self.lock = threading.Lock()
        self._base = bundle.positions() if "pos_embed" in self.manifest.inputs else None
        self._grids: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        _FEEDS.add(self)

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        """``image`` and, where the bundle serves several sizes, ``pos_embed``, for uint8 RGB images ``(B, H, W, 3)``.

        Raises:
            PhregError: no such array, or a size or batch that the bundle does not serve.
        """
        batch = check_batch(batch)
        self.check(batch.shape)
        return {"image": batch, **self.others((batch.shape[1], batch.shape[2]))}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ``PhregError`` unless the bundle serves batches of this shape ``(B, H, W, 3)``."""
        self.manifest.sizes.check((shape[1], shape[2]), self.manifest.model.patch)
        self.manifest.batches.check(shape[0])

    def others(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The inputs beside the images: ``pos_embed`` ``(1, Hp * Wp, C)`` float32, or none."""
        if self._base is None:
            return {}
        with self.lock:
            positions = self._grids.get(size)
            if positions is None:
                patch = self.manifest.model.patch
                check_multiple(size, patch)
                positions = resample(self._base, (size[0] // patch[0], size[1] // patch[1]))
                self._grids[size] = positions
                if len(self._grids) > GRIDS_KEPT:
                    self._grids.popitem(last=False)
            else:
                self._grids.move_to_end(size)
            return {"pos_embed": positions}


def check_batch(batch: Any) -> np.ndarray:
    """The array of a batch on the host, uint8 ``(B, H, W, 3)``.

    Raises:
        PhregError: something else.
    """
    array = host_array(batch, "extract")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        got = type(batch).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise PhregError(f"extract: got {got}, expected a uint8 RGB array (B, H, W, 3) with B at least 1.")
    return array


_FEEDS: weakref.WeakSet[InputFeed] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: another thread of the parent may have held a lock."""
    for feed in list(_FEEDS):
        feed.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
