"""Measure artifacts in dense feature maps, with one definition for every command. Needs numpy only.

The tap "pre-norm" is the last block's output before the final norm; "served" are the features after it. Norm outliers
show only at the pre-norm tap, because the final norm hides them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phreg_deploy.spec import Stored

# A patch token is an outlier above 2x or below 1/2 of the base model's median norm.
OUTLIER_FACTOR = 2.0
# A patch is incoherent if its centred cosine distance to its other views is above this.
INCOHERENT = 0.5


@dataclass(frozen=True)
class NormOutliers(Stored):
    """``rate`` = ``upper`` + ``lower``: shares of patch tokens, 0-1. ``largest``: the largest norm over the median."""

    rate: float
    upper: float
    lower: float
    largest: float
    median: float


@dataclass(frozen=True)
class ShiftIncoherence(Stored):
    """Share of patches above ``INCOHERENT``, and percentiles of 1 - cosine to the mean of the other views."""

    rate: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Agreement(Stored):
    """Cosine per patch token between two feature maps: mean, 1st percentile, minimum, and over chosen tokens."""

    mean: float
    p1: float
    minimum: float
    chosen: float | None = None


def outlier_mask(token_norm: np.ndarray, median: float) -> np.ndarray:
    """Mark the norm outliers among patch tokens; ``token_norm``: pre-norm L2 norms, any shape."""
    return (token_norm > OUTLIER_FACTOR * median) | (token_norm < median / OUTLIER_FACTOR)


def norm_outliers(token_norm: np.ndarray, median: float | None = None) -> NormOutliers:
    """Compute the norm-outlier rate of ``token_norm``: pre-norm L2 norms, any shape.

    ``median``: the *base* model's median patch-token norm; None for the median of the array.

    Source: high-norm tokens of arXiv 2309.16588, made scale-free and two-sided because arXiv 2505.21501 section 4.4
    finds low-norm artifacts in CLIP.
    """
    norms = np.asarray(token_norm, dtype=np.float64)
    centre = float(np.median(norms)) if median is None else float(median)
    upper = float(np.mean(norms > OUTLIER_FACTOR * centre))
    lower = float(np.mean(norms < centre / OUTLIER_FACTOR))
    return NormOutliers(upper + lower, upper, lower, float(norms.max() / centre), centre)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the cosine along the last axis in float64; 0 if one of the vectors is zero."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.einsum("...c,...c->...", a, b) / np.where(size == 0, 1.0, size)


def agreement(features: np.ndarray, target: np.ndarray, chosen: np.ndarray | None = None) -> Agreement:
    """Compute the cosine per patch token between ``features`` and ``target``, both ``(..., C)``.

    ``chosen``: a mask of tokens whose mean is reported too, such as the base model's outliers.
    """
    return agreement_of(cosine(features, target), chosen)


def agreement_of(values: np.ndarray, chosen: np.ndarray | None = None) -> Agreement:
    """Compute the same from the cosines, for features that do not fit in memory together."""
    over = float(values[chosen].mean()) if chosen is not None and chosen.any() else None
    return Agreement(float(values.mean()), float(np.quantile(values, 0.01)), float(values.min()), over)


def shift_incoherence(
    plain: np.ndarray, others: np.ndarray, valid: np.ndarray, centre: np.ndarray, least: int = 4
) -> ShiftIncoherence:
    """Measure how far each patch's feature moves when the image is shifted (the criterion of arXiv 2505.21501).

    Args:
        plain: served features of the unshifted view, ``(B, Hp, Wp, C)``.
        others: *sum* of the re-aligned features of the other views, same shape.
        valid: how many other views cover each patch, ``(B, Hp, Wp)``; patches with fewer than ``least`` are left out.
        centre: mean feature over the data set, ``(C,)``, which is subtracted because anisotropy inflates cosines.
    """
    mean = others / np.maximum(valid, 1)[..., None]
    distance = (1 - cosine(plain - centre, mean - centre))[valid >= least]
    p50, p90, p95, p99 = (float(q) for q in np.quantile(distance, (0.5, 0.9, 0.95, 0.99)))
    return ShiftIncoherence(float(np.mean(distance > INCOHERENT)), p50, p90, p95, p99)
