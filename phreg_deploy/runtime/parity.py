"""Parity of two runs of one model, and the gates that decide whether it holds. Knows neither torch nor files of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import cosine, norm_outliers
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import AT_LEAST, GATES, SENTENCES, exam_bars
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

NEIGHBOURS = 1024  # patch tokens at most among which nearest neighbours are looked for


@dataclass(frozen=True)
class Parity(Stored):
    """Agreement of dense features ``(B, Hp, Wp, C)`` with a reference.

    ``cosine_*`` per patch token; ``relative_l2`` and ``largest_difference`` over all values; ``neighbours``: share of
    patches whose nearest other patch is the same; ``outlier_points``: change of the norm-outlier rate in percentage
    points; ``norm_difference``: largest relative difference of pre-norm norms; ``norm_bias``: how far the median of
    their ratios is from 1; ``cls_cosine``: of the worst image; ``bad_values``: NaN or infinite.
    """

    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    relative_l2: float
    largest_difference: float
    neighbours: float
    outlier_points: float
    norm_difference: float
    norm_bias: float
    cls_cosine: float | None
    bad_values: int


class ParityAccumulator:
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
        lost = sorted(set(expected) & {"cls", "token_norm"} - set(got))
        if lost:
            raise PhregError(
                f"parity: got no {' and no '.join(lost)}, which the reference has; export the bundle again."
            )
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
            worst = float("inf")
            return Parity(0.0, 0.0, 0.0, worst, worst, 0.0, 100.0, worst, worst, None, self._bad)
        values = np.concatenate(self._cosines)
        norms, wanted = (np.concatenate([pair[i].reshape(-1) for pair in self._norms]) for i in (0, 1))
        ratios = norms / np.maximum(wanted, 1e-12)
        centre = float(np.median(wanted)) if self.median is None else self.median
        shift = abs(norm_outliers(norms, centre).rate - norm_outliers(wanted, centre).rate)
        return Parity(
            cosine_mean=float(values.mean()), cosine_p1=float(np.quantile(values, 0.01)), cosine_min=float(values.min()),
            relative_l2=float((self._squares[0] / max(self._squares[1], 1e-24)) ** 0.5), largest_difference=self._largest,
            neighbours=float(np.concatenate(self._same).mean()), outlier_points=100 * shift,
            norm_difference=float(np.abs(ratios - 1).max()), norm_bias=float(abs(np.median(ratios) - 1)), cls_cosine=min(self._cls) if self._cls else None, bad_values=0,
        )  # fmt: skip


def compare_runs(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], median: float | None = None) -> Parity:
    """Parity between two runs of one batch, see ``ParityAccumulator``."""
    tally = ParityAccumulator(median)
    tally.add(got, expected)
    return tally.parity()


@dataclass(frozen=True)
class Gate(Stored):
    """One figure of a parity beside its bar. ``name``: the field of ``Parity``."""

    name: str
    bar: float
    figure: float
    passed: bool

    def __str__(self) -> str:
        return SENTENCES[self.name].format(figure=self.figure, bar=self.bar)


def gates_of(
    parity: Parity,
    precision: str,
    cosine_p1: float | None = None,
    outlier_points: float | None = None,
    *,
    exam: bool = False,
    again: bool = False,
) -> list[Gate]:
    """Every gate of a precision with its verdict. A user's own bars replace the precision's.

    Args:
        exam: against the bundle's own answers, which for 8 bits are 8-bit answers of ONNX Runtime.
        again: and the runtime that wrote them gives them again, see ``writes_exams``.
    """
    bars = exam_bars(precision, again) if exam else GATES[precision]
    own = {"cosine_p1": cosine_p1, "outlier_points": outlier_points}
    bars = {"bad_values": 0, **bars, **{name: bar for name, bar in own.items() if bar is not None}}
    found = []
    for name, bar in bars.items():
        figure = getattr(parity, name)
        if figure is not None:  # a model without class token
            found.append(Gate(name, bar, figure, bool(figure >= bar if name in AT_LEAST else figure <= bar)))
    return found


def missed_gates(
    parity: Parity, precision: str, cosine_p1: float | None = None, outlier_points: float | None = None, **kind: bool
) -> list[str]:
    """The gates that ``parity`` misses, as sentences; empty when it passes. See ``gates_of``."""
    return [str(gate) for gate in gates_of(parity, precision, cosine_p1, outlier_points, **kind) if not gate.passed]


def verdict(parity: Parity, gates: list[Gate]) -> dict[str, Any]:
    """A parity and its gates as reports hold them: ``parity``, ``gates``, ``missed`` as sentences, ``passed``."""
    missed = [str(gate) for gate in gates if not gate.passed]
    return {
        "parity": parity.to_json(), "gates": [gate.to_json() for gate in gates], "missed": missed, "passed": not missed,
    }  # fmt: skip


def gate_precision(manifest: Manifest, compute: str) -> str:
    """The precision whose gates hold: the bundle's, or bfloat16 where a bundle in FP32 or FP16 is computed in it."""
    return "bf16" if manifest.precision in ("fp32", "fp16") and compute == "bf16" else manifest.precision


def writes_exams(manifest: Manifest, backend: str) -> bool:
    """Whether this backend wrote the bundle's own answers: ONNX Runtime those of bundles in 8 bits."""
    return backend == "onnxruntime-cpu" and manifest.quantisation is not None


@dataclass(frozen=True)
class ExamCase:
    """One case of a bundle's exam: ``size`` (height, width), ``batch``, and the parity of the answers."""

    size: tuple[int, int]
    batch: int
    parity: Parity


def run_exam(bundle: Bundle, answer: Callable[[np.ndarray], dict[str, np.ndarray]]) -> list[ExamCase]:
    """Compare a backend's answers with those in the bundle.

    Args:
        answer: uint8 ``(B, H, W, 3)`` -> the graph's outputs by name, as ``FeatureExtractor.run``.
    """
    return [
        ExamCase(
            case["image"].shape[1:3],
            len(case["image"]),
            compare_runs(answer(case["image"]), case, bundle.manifest.norm_median),
        )
        for case in bundle.cases()
    ]


def worst(parities: list[Parity]) -> Parity:
    """The weakest figure of each kind over several comparisons."""
    pick = {
        name: (min if name.startswith("cosine") or name in AT_LEAST else max)(values)
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
