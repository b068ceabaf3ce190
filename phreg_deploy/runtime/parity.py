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


class Tally:
    """Parity gathered batch by batch, so that memory holds one figure per patch token and no features.

    Args:
        median: the base model's median norm; without it that of all expected norms.
    """

    def __init__(self, median: float | None = None) -> None:
        self.median = median
        self._cosines: list[np.ndarray] = []
        self._norms: list[tuple[np.ndarray, np.ndarray]] = []
        self._same: list[np.ndarray] = []
        self._squares = [0.0, 0.0]
        self._largest = 0.0
        self._cls: list[float] = []
        self._bad = 0

    def add(self, got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        """One more batch of ``features``, ``token_norm`` and, where there is one, ``cls``; float32 or float16.

        Raises:
            PhregError: shapes that differ.
        """
        a, b = got["features"].astype(np.float64), expected["features"].astype(np.float64)
        if a.shape != b.shape:
            raise PhregError(f"parity: got features of shape {a.shape}, expected {b.shape}.")
        bad = int(sum((~np.isfinite(v)).sum() for v in got.values()))
        self._bad += bad
        if bad:
            return
        self._cosines.append(cosine(a, b).reshape(-1))
        self._norms.append((got["token_norm"].astype(np.float64), expected["token_norm"].astype(np.float64)))
        self._same.append((_nearest(a) == _nearest(b)).reshape(-1))
        difference = a - b
        self._squares[0] += float(np.vdot(difference, difference))
        self._squares[1] += float(np.vdot(b, b))
        self._largest = max(self._largest, float(np.abs(difference).max()))
        if "cls" in got and "cls" in expected:
            self._cls.append(float(cosine(got["cls"], expected["cls"]).min()))

    def parity(self) -> Parity:
        if self._bad or not self._cosines:
            return Parity(0.0, 0.0, 0.0, float("inf"), float("inf"), 0.0, 100.0, float("inf"), None, self._bad)
        values = np.concatenate(self._cosines)
        norms, wanted = (np.concatenate([pair[i].reshape(-1) for pair in self._norms]) for i in (0, 1))
        centre = float(np.median(wanted)) if self.median is None else self.median
        shift = abs(norm_outliers(norms, centre).rate - norm_outliers(wanted, centre).rate)
        return Parity(
            cosine_mean=float(values.mean()), cosine_p1=float(np.quantile(values, 0.01)), cosine_min=float(values.min()),
            relative_l2=float((self._squares[0] / max(self._squares[1], 1e-24)) ** 0.5), largest_difference=self._largest,
            neighbours=float(np.concatenate(self._same).mean()), outlier_points=100 * shift,
            norm_difference=float(np.abs(norms / wanted - 1).max()), cls_cosine=min(self._cls) if self._cls else None, bad_values=0,
        )  # fmt: skip


def compare_runs(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], median: float | None = None) -> Parity:
    """Parity between two runs of one batch, see ``Tally``."""
    tally = Tally(median)
    tally.add(got, expected)
    return tally.parity()


def judge(
    parity: Parity,
    precision: str,
    cosine_p1: float | None = None,
    outlier_points: float | None = None,
    *,
    exam: bool = False,
) -> list[str]:
    """The gates that ``parity`` misses, in words; empty when it passes. A user's own gates replace the precision's.

    Args:
        exam: against the bundle's own answers, which for 8 bits are 8-bit answers of another runtime.
    """
    gates = GATES[precision]
    exam = exam and "exam_p1" in gates
    least = gates["exam_p1" if exam else "cosine_p1"] if cosine_p1 is None else cosine_p1
    most = gates["outlier_points"] if outlier_points is None else outlier_points
    missed = []
    if parity.bad_values:
        missed.append(f"{parity.bad_values} NaN or infinite values, expected none")
    if not parity.cosine_p1 >= least:
        missed.append(f"1st-percentile patch cosine {parity.cosine_p1:.7f}, expected at least {least}")
    if not parity.outlier_points <= most:
        missed.append(f"norm-outlier rate changed by {parity.outlier_points:.4f} points, expected at most {most}")
    if not exam and not parity.neighbours >= gates.get("neighbours", 0.0):
        missed.append(
            f"nearest neighbours of {parity.neighbours:.4f} of the patches agree, expected at least {gates['neighbours']}"
        )
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
