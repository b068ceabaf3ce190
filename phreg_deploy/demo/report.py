"""What the demo measured: figures of the base model, the student and both served bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.spec import Stored, plain
from phreg_deploy.verify.report import CheckReport

# Figure: the name and the format of its row.
ROWS = {
    "norm_outlier_rate": ("norm-outlier rate", "{:.3%}"),
    "largest_norm": ("largest norm / median", "{:.2f}"),
    "worst_block": ("largest norm / median in the worst block", "{:.2f}"),
    "fidelity": ("cosine to the denoised target, mean", "{:.4f}"),
    "fidelity_outliers": ("    over the base's outlier tokens", "{:.4f}"),
    "probe_accuracy": ("segmentation probe, patch accuracy", "{:.1%}"),
    "probe_accuracy_outliers": ("    over the base's outlier tokens", "{:.1%}"),
    "probe_miou": ("segmentation probe, mean IoU", "{:.1%}"),
}


@dataclass(frozen=True)
class Figures(Stored):
    """Figures of one model on the test scenes.

    Norms are in medians of the base model's patch norms; ``worst_block`` is None for a bundle. ``fidelity``: cosine to
    the denoised target. Accuracies and the intersection over union (``probe_miou``) of a linear probe are 0-1.
    """

    norm_outlier_rate: float
    largest_norm: float
    worst_block: float | None
    fidelity: float
    fidelity_outliers: float | None
    probe_accuracy: float
    probe_accuracy_outliers: float
    probe_miou: float


@dataclass(frozen=True)
class DemoReport:
    """The result of the demo. ``figures``: of "base", "student", "served" (ONNX Runtime) and "int8" (served)."""

    output: Path
    scenes: int
    classes: tuple[str, ...]
    figures: dict[str, Figures]
    check: CheckReport
    register_neurons: dict[RegisterNeuron, str | None]
    seconds: float

    @property
    def table(self) -> list[list[str]]:
        """Rows of a name and a figure per model, as text."""
        columns = [figures.to_json() for figures in self.figures.values()]
        return [
            [name, *("-" if column[key] is None else form.format(column[key]) for column in columns)]
            for key, (name, form) in ROWS.items()
        ]

    def to_json(self) -> dict[str, Any]:
        neurons = [{**neuron.to_json(), "left": reason} for neuron, reason in self.register_neurons.items()]
        return {**plain(vars(self)), "table": self.table, "register_neurons": neurons}
