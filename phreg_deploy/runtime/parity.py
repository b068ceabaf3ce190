"""Parity of two runs of one model, and the gates that decide whether it holds. Knows neither torch nor files of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.artifacts import cosine, norm_outliers
from phreg_deploy.bundle import GATES
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import Stored

NEIGHBOURS = 1024  # patch tokens at most among which nearest neighbours are looked for


@dataclass(frozen=True)
class Parity(Stored):
    """Agreement of dense features ``(B, Hp, Wp, C)`` with a reference.

    ``cosine_*`` per patch token; ``relative_l2`` and ``largest_difference`` over all values; ``neighbours``: share of
    patches whose nearest other patch is the same; ``outlier_points``: change of the norm-outlier rate in percentage
    points; ``norm_difference``: largest relative difference of pre-norm norms; ``bad_values``: NaN or infinite.
    """

    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    relative_l2: float
    largest_difference: float
    neighbours: float
    outlier_points: float
    norm_difference: float
    cls_cosine: float | None
    bad_values: int


def compare_runs(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], median: float | None = None) -> Parity:
    """Parity between two runs' ``features``, ``token_norm`` and, where there is one, ``cls``; float32 or float16.

    Args:
        median: the base model's median norm; without it the expected run's own.

    Raises:
        PhregError: shapes that differ.
    """
    a, b = got["features"].astype(np.float64), expected["features"].astype(np.float64)
    if a.shape != b.shape:
        raise PhregError(f"parity: got features of shape {a.shape}, expected {b.shape}.")
    bad = int(sum((~np.isfinite(v)).sum() for v in got.values()))
    if bad:
        return Parity(0.0, 0.0, 0.0, float("inf"), float("inf"), 0.0, 100.0, float("inf"), None, bad)
    values = cosine(a, b)
    norms, wanted = got["token_norm"].astype(np.float64), expected["token_norm"].astype(np.float64)
    centre = float(np.median(wanted)) if median is None else median
    shift = abs(norm_outliers(norms, centre).rate - norm_outliers(wanted, centre).rate)
    return Parity(
        cosine_mean=float(values.mean()), cosine_p1=float(np.quantile(values, 0.01)), cosine_min=float(values.min()),
        relative_l2=float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)), largest_difference=float(np.abs(a - b).max()),
        neighbours=float(np.mean(_nearest(a) == _nearest(b))), outlier_points=100 * shift,
        norm_difference=float(np.abs(norms / wanted - 1).max()),
        cls_cosine=float(cosine(got["cls"], expected["cls"]).min()) if "cls" in got and "cls" in expected else None, bad_values=bad,
    )  # fmt: skip


def judge(
    parity: Parity, precision: str, cosine_p1: float | None = None, outlier_points: float | None = None
) -> list[str]:
    """The gates that ``parity`` misses, in words; empty when it passes. A user's own gates replace the precision's."""
    gates = GATES[precision]
    least = gates["cosine_p1"] if cosine_p1 is None else cosine_p1
    most = gates["outlier_points"] if outlier_points is None else outlier_points
    missed = []
    if parity.bad_values:
        missed.append(f"{parity.bad_values} NaN or infinite values, expected none")
    if not parity.cosine_p1 >= least:
        missed.append(f"1st-percentile patch cosine {parity.cosine_p1:.7f}, expected at least {least}")
    if not parity.outlier_points <= most:
        missed.append(f"norm-outlier rate changed by {parity.outlier_points:.4f} points, expected at most {most}")
    return missed


def check_reference(extractor: FeatureExtractor) -> list[dict[str, Any]]:
    """The bundle's own exam: one entry per case with its ``size``, ``batch`` and ``parity``."""
    found = []
    for case in extractor.bundle.cases():
        parity = compare_runs(extractor.run(case["image"]), case, extractor.manifest.norm_median)
        found.append({"size": list(case["image"].shape[1:3]), "batch": len(case["image"]), "parity": parity})
    return found


def worst(parities: list[Parity]) -> Parity:
    """The weakest figure of each kind over several comparisons."""
    pick = {
        name: (min if name.startswith(("cosine", "neighbours", "cls")) else max)(values)
        for name in Parity.__dataclass_fields__
        if (values := [getattr(p, name) for p in parities if getattr(p, name) is not None])
    }
    return Parity(**{"cls_cosine": None, **pick})


def _nearest(features: np.ndarray) -> np.ndarray:
    """For each of a fixed sample of patch tokens, the index of the most similar other one of its image."""
    flat = features.reshape(len(features), -1, features.shape[-1])
    flat = flat[:, :: max(1, flat.shape[1] // NEIGHBOURS)]
    unit = flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    similar = unit @ unit.transpose(0, 2, 1)
    index = np.arange(similar.shape[1])
    similar[:, index, index] = -np.inf
    return similar.argmax(-1)  # type: ignore[no-any-return]
