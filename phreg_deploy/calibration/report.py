"""What a calibration measured and decided: the content of ``calibration.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.calibration.images import Shares
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.parity import Gate, Parity
from phreg_deploy.spec import Stored, plain


@dataclass(frozen=True)
class Sensitivity(Stored):
    """What one layer alone gains in mean and 1st-percentile patch cosine in float, measured on ``images`` images."""

    mean: float
    p1: float
    images: int


@dataclass(frozen=True)
class Trial(Stored):
    """A smoothing that was tried, and the features it gave."""

    smoothing: Smoothing
    parity: Parity


@dataclass(frozen=True)
class FallbackStep(Stored):
    """The features after one more layer went back to float; ``layer`` is None for the graph before the first."""

    layer: str | None
    parity: Parity


@dataclass(frozen=True)
class LayerReport(Stored):
    """One linear layer.

    ``input``: what feeds it ("norm", "value" or "hidden"). ``macs``: its share of the linear layers'
    multiply-accumulates. ``precision``: "float" or the mode; ``reason``: why it is in float. ``low``, ``high``: its
    input's range over the images. ``step``, ``zero``: the grid of its input.
    """

    name: str
    input: str
    macs: float
    precision: str
    reason: str | None
    low: float
    high: float
    step: float
    zero: int
    sensitivity: Sensitivity


@dataclass(frozen=True)
class CalibrationReport:
    """Ranges, sensitivities, layers in float with the reason, and the fidelity on images that took part in no choice.

    ``output``: the bundle's folder, the only field that is not stored. ``islands``: nodes in FP32 within an FP16 graph.
    """

    output: Path
    mode: str
    target: str
    smoothing: Smoothing
    candidates: list[Trial]
    images: Shares
    layers: list[LayerReport]
    fallback: list[FallbackStep]
    float_layers: list[str]
    float_macs: float
    islands: list[str]
    bar: dict[str, float]
    fidelity: Parity
    gates: list[Gate]
    seconds: float
    versions: dict[str, str]

    @property
    def integer_layers(self) -> int:
        return len(self.layers) - len(self.float_layers)

    @property
    def missed(self) -> list[str]:
        """The gates that the features miss, as sentences."""
        return [str(gate) for gate in self.gates if not gate.passed]

    def to_json(self) -> dict[str, Any]:
        """The content of ``calibration.json``."""
        fields = {name: value for name, value in vars(self).items() if name != "output"}
        derived = {"integer_layers": self.integer_layers, "missed": self.missed, "passed": not self.missed}
        return {"format": 1, **plain(fields), **derived}
