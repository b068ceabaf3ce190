"""Keep what a page shows of each model: parity by image, the outputs on the worst images, token norms by block."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phreg_deploy.images.photographs import Photographs
from phreg_deploy.layers import FEATURES, HEADS, NORM, SEGMENTATION, kind_of
from phreg_deploy.spec import Stored

# Of the patch cosines over all images.
PERCENTILES = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 25, 50, 75, 90, 100)
Outputs = Mapping[str, np.ndarray]  # a bundle's outputs by name


@dataclass(frozen=True)
class ImageParity(Stored):
    """Cosine per patch of one image: mean, 1st percentile, minimum."""

    image: str
    cosine_mean: float
    cosine_p1: float
    cosine_min: float


@dataclass(frozen=True)
class ParityByImage:
    """Patch cosines with ``reference`` ("student", or the first bundle): every image, the worst first.

    ``percentiles``: of the cosines of all patches of all images, by ``PERCENTILES``.
    """

    reference: str
    images: tuple[ImageParity, ...]
    percentiles: dict[str, float]

    @classmethod
    def of(cls, reference: str, names: Sequence[str], cosines: np.ndarray) -> ParityByImage:
        """Sum up ``cosines`` ``(M, N)`` of the images ``names``."""
        rows = [
            ImageParity(name, float(row.mean()), float(np.quantile(row, 0.01)), float(row.min()))
            for name, row in zip(names, cosines)
        ]
        values = np.percentile(cosines, PERCENTILES)
        percentiles = {str(q): float(value) for q, value in zip(PERCENTILES, values)}
        return cls(reference, tuple(sorted(rows, key=lambda row: row.cosine_p1)), percentiles)

    def to_json(self) -> dict[str, Any]:
        images = [row.to_json() for row in self.images]
        return {"with": self.reference, "images": images, "percentiles": self.percentiles}


@dataclass(frozen=True)
class Maps:
    """Outputs on M images, the worst first.

    ``images`` uint8 ``(M, H, W, 3)``, with their ``names`` and the sha256 of their files, ``digests``. ``outputs``: by
    model ("base", "student", and each bundle) and by name of output, ``(M, ...)``: features, token norms and answers of
    heads, of logits the class, uint8. ``norms``: by model and number of
    blocks, the pre-norm norms of the patch tokens of every measured image, flat. ``median``: the base model's median
    norm, else that of the first model. ``digest``: of all measured images.
    """

    names: tuple[str, ...]
    digests: tuple[str, ...]
    images: np.ndarray
    outputs: dict[str, dict[str, np.ndarray]]
    norms: dict[str, dict[int, np.ndarray]]
    median: float
    digest: str


@dataclass
class Gallery:
    """Keeps the outputs on the ``size`` worst images that are added, and no others."""

    size: int
    _kept: list[tuple[float, int, dict[str, dict[str, np.ndarray]]]] = field(default_factory=list)

    def add(self, index: int, badness: float, outputs: dict[str, dict[str, np.ndarray]]) -> None:
        """Add one image by its index; of equally bad ones the first stay. Its outputs are copied if they are kept."""
        if len(self._kept) == self.size and (self.size == 0 or (badness, -index) < self._kept[0][:2]):
            return
        own = {model: _shown(of_model) for model, of_model in outputs.items()}
        entry = (badness, -index, own)
        if len(self._kept) < self.size:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heapreplace(self._kept, entry)

    def maps(self, photographs: Photographs, norms: dict[str, dict[int, np.ndarray]], median: float) -> Maps | None:
        """Return what was kept, the worst image first; None if nothing was."""
        kept = sorted(self._kept, key=lambda entry: entry[:2], reverse=True)
        if not kept:
            return None
        chosen = photographs.subset(-entry[1] for entry in kept)
        outputs = {
            model: {name: np.stack([entry[2][model][name] for entry in kept]) for name in of_model}
            for model, of_model in kept[0][2].items()
        }
        images = np.stack([chosen.array(i) for i in range(len(chosen))])
        return Maps(tuple(chosen.names), tuple(chosen.digests), images, outputs, norms, median, photographs.digest())


def _shown(outputs: Outputs) -> dict[str, np.ndarray]:
    """Copy what a page shows of one image."""
    shown = {}
    for name, value in outputs.items():
        kind = kind_of(name)
        if kind == SEGMENTATION:
            shown[name] = value.argmax(-1).astype(np.uint8)
        elif kind in (FEATURES, NORM, *HEADS):
            shown[name] = value.copy()
    return shown
