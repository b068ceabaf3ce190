"""Compare predictions with the truth image by image, and sum images up to figures. M images, K classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.evaluation.data.truth import VOID

# Columns of the parts of one image beside those of its classes.
COUNTS = ("pixels_right", "pixels", "patches_right", "patches", "outliers_right", "outliers")


@dataclass(frozen=True)
class ClassParts:
    """Counts of each image, from which every figure of any set of images follows.

    ``pixels`` and ``patches`` float64 ``(M, K, 3)``: intersection and union of prediction and truth, and the truth's
    count, for every class. ``counts`` ``(M, 6)``: see ``COUNTS``.
    """

    pixels: np.ndarray
    patches: np.ndarray
    counts: np.ndarray

    task = "segmentation"

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the figures of sets of images, each ``(R,)``; ``weights`` ``(R, M)``: how often each image counts."""
        counts = dict(zip(COUNTS, (weights @ self.counts).T))
        return {
            "miou": _mean_iou(weights, self.pixels),
            "pixel_accuracy": _share(counts["pixels_right"], counts["pixels"]),
            "patch_miou": _mean_iou(weights, self.patches),
            "patch_accuracy": _share(counts["patches_right"], counts["patches"]),
            "outlier_accuracy": _share(counts["outliers_right"], counts["outliers"]),
        }

    def class_iou(self) -> list[float | None]:
        """The IoU over pixels of every class; None for one that does not occur in the truth."""
        intersection, union, occurs = self.pixels.sum(0).T
        return [float(i / u) if n else None for i, u, n in zip(intersection, union, occurs)]


@dataclass(frozen=True)
class DepthParts:
    """``errors`` float64 ``(M, 3)``: of each image RMSE, AbsRel and the share of pixels with delta < 1.25."""

    errors: np.ndarray

    task = "depth"

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the means over sets of images, each ``(R,)``; ``weights`` ``(R, M)``: how often each image counts."""
        means = (weights @ self.errors) / weights.sum(1, keepdims=True)
        return dict(zip(("rmse", "abs_rel", "delta_1"), means.T))


Parts = ClassParts | DepthParts
# Figures that are better when they are lower.
LOWER = ("rmse", "abs_rel")
# The figure that decides a comparison, by task.
DECIDES = {"segmentation": "miou", "depth": "rmse"}


def class_row(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Count one image, or its patches: float64 ``(K, 3)``.

    ``predicted`` has values below K; ``truth`` too, where it is not void, which is ``VOID`` or below 0.
    """
    known = (truth != VOID) & (truth >= 0)
    p, t = predicted[known].astype(np.int64), truth[known].astype(np.int64)
    matrix = np.bincount(t * classes + p, minlength=classes * classes).reshape(classes, classes)
    same, of_truth, of_prediction = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return np.stack([same, of_truth + of_prediction - same, of_truth], -1).astype(np.float64)


def depth_row(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute RMSE, AbsRel and the share of delta < 1.25 of one image, over pixels with a depth; float64 ``(3,)``."""
    known = ~np.isnan(truth)
    p, t = predicted[known].astype(np.float64), truth[known].astype(np.float64)
    ratio = np.maximum(p / t, t / p)
    return np.array([np.sqrt(np.mean((p - t) ** 2)), np.mean(np.abs(p - t) / t), np.mean(ratio < 1.25)])


def figures_of(parts: list[Parts]) -> dict[str, Any]:
    """Figures of all images, means over the seeds of ``parts``; None where nothing was counted."""
    once = np.ones((1, _images(parts[0])))
    every = [{name: float(value[0]) for name, value in p.figures(once).items()} for p in parts]
    means = {name: float(np.mean([figures[name] for figures in every])) for name in every[0]}
    return {name: None if np.isnan(value) else value for name, value in means.items()}


def per_image(parts: Parts, figure: str) -> np.ndarray:
    """One figure of every image alone, ``(M,)``."""
    return parts.figures(np.eye(_images(parts)))[figure]


def _images(parts: Parts) -> int:
    return len(parts.errors if isinstance(parts, DepthParts) else parts.counts)


def _mean_iou(weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur in each set of images."""
    sums = (weights @ parts.reshape(len(parts), -1)).reshape(len(weights), -1, 3)
    occurs = sums[..., 2] > 0
    iou = np.where(occurs, sums[..., 0] / np.maximum(sums[..., 1], 1), 0)
    return _share(iou.sum(-1), occurs.sum(-1).astype(np.float64))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)
