"""Predict the images to test on, and count what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import outlier_mask
from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.sources import Source
from phreg_deploy.evaluation.data.splits import Split
from phreg_deploy.evaluation.data.store import FeatureStore
from phreg_deploy.evaluation.data.truth import Depths, Masks, Truth, scored
from phreg_deploy.evaluation.scores import ClassParts, DepthParts, Parts, class_row, depth_row
from phreg_deploy.heads.head import Head
from phreg_deploy.images.upsampling import upsample


@dataclass(frozen=True)
class BaseTokens:
    """The base model, and which of its patch tokens are norm outliers.

    ``outliers``: bool ``(Hp, Wp)`` by image, relative to ``median``, the median norm over the images to test on.
    """

    source: Source
    median: float
    outliers: dict[str, np.ndarray]

    @classmethod
    def of(cls, store: FeatureStore, split: Split) -> BaseTokens:
        """Find the outliers of the base model; ``store`` holds its features."""
        norms = {name: store.read(name)["norms"] for name in split.val}
        median = float(np.median(np.stack(list(norms.values()))))
        return cls(store.source, median, {name: outlier_mask(norm, median) for name, norm in norms.items()})

    @property
    def count(self) -> int:
        return sum(int(mask.sum()) for mask in self.outliers.values())

    def check_crop(self, source: Source) -> None:
        """Raise ``PhregError`` unless another model sees the same part of each image."""
        own, other = self.source.preprocess, source.preprocess
        if (own.crop_mode, own.crop_pct) != (other.crop_mode, other.crop_pct):
            raise PhregError(
                f"evaluate: {self.source.name} sees the images by {own.crop_mode} {own.crop_pct:g} and {source.name} "
                f"by {other.crop_mode} {other.crop_pct:g}; expected the same part of each image."
            )


def read_heads(
    store: FeatureStore, heads: list[Head], truth: Truth, split: Split, base: BaseTokens, advance: Callable[..., None]
) -> list[Parts]:
    """Predict every image to test on with every head: logits enlarged bilinearly to the truth's pixels."""
    rows: list[list[Any]] = [[] for _ in heads]
    source = store.source
    for name in split.val:
        pixels = scored(truth.read(name), source.size, source.preprocess)
        features = store.read(name)["features"][None]
        for head, row in zip(heads, rows):
            logits = head.logits(features)
            predicted = head.decide(upsample(logits, pixels.shape))[0]
            if isinstance(truth, Depths):
                row.append(depth_row(predicted, pixels))
            else:
                row.append(_class_rows(name, logits, predicted, pixels, source, truth, base))
        advance()
    if isinstance(truth, Depths):
        return [DepthParts(np.stack(row)) for row in rows]
    return [ClassParts(*(np.stack(part) for part in zip(*row))) for row in rows]


def _class_rows(
    name: str,
    logits: np.ndarray,
    predicted: np.ndarray,
    pixels: np.ndarray,
    source: Source,
    truth: Masks,
    base: BaseTokens,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count one image: over pixels, over patches, and the columns of ``scores.COUNTS``."""
    classes, first = len(truth.classes), base.source
    labels = truth.on_patches(name, source.size, source.grid, source.preprocess)
    of_pixels, of_patches = class_row(predicted, pixels, classes), class_row(logits[0].argmax(-1), labels, classes)
    at_base = truth.on_patches(name, first.size, first.grid, first.preprocess)
    chosen = base.outliers[name] & (at_base >= 0)
    right = (upsample(logits, first.grid)[0].argmax(-1) == at_base) & chosen
    counts = [*_right(of_pixels), *_right(of_patches), right.sum(), chosen.sum()]
    return of_pixels, of_patches, np.array(counts, np.float64)


def _right(rows: np.ndarray) -> tuple[float, float]:
    """Return how many were predicted right, and how many there were."""
    return float(rows[:, 0].sum()), float(rows[:, 2].sum())
