"""The gates that a parity must pass, and the exam that a bundle carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phreg_deploy.artifacts.parity import Parity as Parity
from phreg_deploy.artifacts.parity import ParityAccumulator as ParityAccumulator
from phreg_deploy.artifacts.parity import compare_runs as compare_runs
from phreg_deploy.artifacts.parity import worst as worst
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import AT_LEAST, GATES, HEADS_ALONE, SENTENCES, exam_bars
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

Answer = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Gate(Stored):
    """One figure of a parity and its bar.

    ``name``: the field of ``Parity``. ``where``: the output with the worst figure, such as "layer 6"; "" for the last
    layer, or where it is not known.
    """

    name: str
    bar: float
    figure: float
    passed: bool
    where: str = ""

    def __str__(self) -> str:
        sentence = SENTENCES[self.name].format(figure=self.figure, bar=self.bar)
        return f"{self.where}: {sentence}" if self.where else sentence

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_json().items() if name != "where" or value}


def gates_of(
    parity: Parity,
    precision: str,
    cosine_p1: float | None = None,
    outlier_points: float | None = None,
    *,
    exam: bool = False,
    again: bool = False,
) -> list[Gate]:
    """Every gate of a precision with its verdict.

    Args:
        cosine_p1, outlier_points: bars of the user, which replace those of the precision.
        exam: the parity is with the bundle's own answers, which ONNX Runtime wrote in 8 bits for 8-bit bundles.
        again: the runtime is the one that wrote these answers, see ``writes_exams``.
    """
    bars = exam_bars(precision, again) if exam else GATES[precision]
    if parity.cosine_p1 is None:
        bars = {**bars, **HEADS_ALONE.get(precision, {})}
    own = {"cosine_p1": cosine_p1, "outlier_points": outlier_points}
    bars = {"bad_values": 0, **bars, **{name: bar for name, bar in own.items() if bar is not None}}
    gates = []
    for name, bar in bars.items():
        figure = getattr(parity, name)
        if figure is None and own.get(name) is not None:
            raise PhregError(
                f"{name}: got the bar {bar}, but only heads were compared, not features. Leave the bar out, or take "
                "the bundle with features."
            )
        # A model without class token has no figure for it, and a bundle of heads alone none of features.
        if figure is not None:
            gates.append(Gate(name, bar, figure, bool(figure >= bar if name in AT_LEAST else figure <= bar)))
    return gates


def missed_gates(
    parity: Parity, precision: str, cosine_p1: float | None = None, outlier_points: float | None = None, **kind: bool
) -> list[str]:
    """The gates that ``parity`` misses, as sentences; arguments as of ``gates_of``."""
    return [str(gate) for gate in gates_of(parity, precision, cosine_p1, outlier_points, **kind) if not gate.passed]


def verdict(parity: Parity, gates: list[Gate]) -> dict[str, Any]:
    """A parity and its gates for reports: ``parity``, ``gates``, ``missed`` (sentences) and ``passed``."""
    missed = [str(gate) for gate in gates if not gate.passed]
    figures = [gate.to_json() for gate in gates]
    return {"parity": parity.to_json(), "gates": figures, "missed": missed, "passed": not missed}


def agreement(parity: dict[str, Any]) -> str:
    """Say how close features are or, where only heads are served, their answers; ``parity`` as JSON."""
    if parity["cosine_p1"] is None:
        return f"the heads' answers change at {parity['head_change']:.4g} of the places"
    return f"1st-percentile patch cosine {parity['cosine_p1']:.8f}, relative L2 {parity['relative_l2']:.2e}"


def gate_precision(manifest: Manifest, compute: str) -> str:
    """The precision whose gates apply: the bundle's, or bfloat16 where an FP32 or FP16 bundle is computed in it."""
    return "bf16" if manifest.precision in ("fp32", "fp16") and compute == "bf16" else manifest.precision


def writes_exams(manifest: Manifest, backend: str) -> bool:
    """Whether this backend wrote the bundle's own answers, as ONNX Runtime does for 8-bit bundles."""
    return backend == "onnxruntime-cpu" and manifest.quantisation is not None


@dataclass(frozen=True)
class ExamCase:
    """One case of a bundle's exam: ``size`` (height, width), ``batch``, and the parity of the answers.

    ``parity`` is the worst of ``parts``, which are as of ``ParityAccumulator.parts``.
    """

    size: tuple[int, int]
    batch: int
    parity: Parity
    parts: dict[str, Parity]


def run_exam(bundle: Bundle, answer: Answer, cases: list[dict[str, np.ndarray]] | None = None) -> list[ExamCase]:
    """Compare a backend's answers with those in the bundle.

    Args:
        answer: uint8 ``(B, H, W, 3)`` -> the graph's outputs by name, e.g. ``FeatureExtractor.run``.
        cases: ``bundle.cases()``, where they are read already.
    """
    compared = []
    for case in bundle.cases() if cases is None else cases:
        image = case["image"]
        accumulator = ParityAccumulator(bundle.manifest.norm_median)
        accumulator.add(answer(image), {name: value for name, value in case.items() if name != "image"})
        compared.append(ExamCase(image.shape[1:3], len(image), accumulator.parity(), accumulator.parts()))
    return compared


def judge_exam(
    bundle: Bundle, answer: Answer, backend: str, compute: str, cases: list[dict[str, np.ndarray]] | None = None
) -> tuple[Parity, list[Gate]]:
    """Run the exam; return the worst parity over its cases, and the gates of that parity.

    Args:
        backend, compute: the name of the backend that answers, and the precision that it computes in.
        answer, cases: see ``run_exam``.
    """
    return judge(bundle, run_exam(bundle, answer, cases), backend, compute)


def judge(bundle: Bundle, compared: list[ExamCase], backend: str, compute: str) -> tuple[Parity, list[Gate]]:
    """Return the worst parity over cases of an exam, and the gates of that parity; arguments as of ``judge_exam``."""
    parity = worst([case.parity for case in compared])
    again = writes_exams(bundle.manifest, backend)
    gates = gates_of(parity, gate_precision(bundle.manifest, compute), exam=True, again=again)
    parts = [item for case in compared for item in case.parts.items()]
    return parity, [gate if gate.passed else _located(gate, parts) for gate in gates]


def part_name(part: str) -> str:
    """How people read a key of ``ParityAccumulator.parts``: "layer 6", "attention", and "" for the last layer."""
    return f"layer {part}" if part.isdigit() else part


def _located(gate: Gate, parts: list[tuple[str, Parity]]) -> Gate:
    """Name the first output that has the gate's figure, which is the worst of all."""
    found = next((part for part, parity in parts if getattr(parity, gate.name) == gate.figure), "")
    return replace(gate, where=part_name(found))
