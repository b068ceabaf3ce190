"""What a check and a scoring return: typed results, each with the JSON that the command line prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from phreg_deploy.artifacts.measures import NormOutliers, ShiftIncoherence
from phreg_deploy.artifacts.scores import Scores
from phreg_deploy.runtime.parity import Gate, Parity
from phreg_deploy.spec import plain
from phreg_deploy.verify.maps import ParityByImage


@dataclass(frozen=True)
class Comparison:
    """Parity with one reference. ``size``: the input size and the number of images, for people."""

    reference: str
    size: str
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        return {"with": self.reference, "size": self.size, "parity": self.parity.to_json()}


@dataclass(frozen=True)
class ArtifactRates:
    """Artifacts of one model. A base model that was only recorded has neither ``shift_incoherence`` nor ``images``.

    ``layers``: norm outliers of a bundle's further layers, by number of blocks.
    """

    norm_outliers: NormOutliers
    shift_incoherence: ShiftIncoherence | None
    images: int | None
    note: str
    layers: dict[str, NormOutliers] = field(default_factory=dict)

    @property
    def incoherent(self) -> float | None:
        """Share of incoherent patches, 0-1."""
        return self.shift_incoherence.rate if self.shift_incoherence else None

    def to_json(self) -> dict[str, Any]:
        shift = asdict(self.shift_incoherence) if self.shift_incoherence else {"rate": None}
        images = {} if self.images is None else {"images": self.images}
        layers = {"layers": plain(self.layers)} if self.layers else {}
        outliers = asdict(self.norm_outliers)
        return {"norm_outliers": outliers, "shift_incoherence": shift, **images, "note": self.note, **layers}


@dataclass(frozen=True)
class CheckReport:
    """The result of ``check``.

    ``artifacts``: by "base", "student" and "bundle". ``gates``: by reference. ``quantised_fidelity`` and
    ``missed_when_calibrated``: of a bundle in 8 bits, as calibration measured them. ``by_image``: parity with the
    student, the worst image first; None without one.
    """

    bundle: str
    backend: str
    compute: str
    choice: str
    precision: str
    images: int
    comparisons: tuple[Comparison, ...]
    artifacts: dict[str, ArtifactRates]
    gates: dict[str, list[Gate]]
    quantised_fidelity: dict[str, float] | None
    missed_when_calibrated: tuple[str, ...]
    by_image: ParityByImage | None = None

    @property
    def missed(self) -> list[str]:
        """The missed gates, as sentences."""
        return [str(gate) for gates in self.gates.values() for gate in gates if not gate.passed]

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("bundle", "backend", "compute", "choice", "precision", "images")},
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "artifacts": {name: rates.to_json() for name, rates in self.artifacts.items()},
            "gates": [{"with": name, **gate.to_json()} for name, gates in self.gates.items() for gate in gates],
            "missed": self.missed,
            "passed": not self.missed,
            "quantised_fidelity": self.quantised_fidelity,
            "by_image": None if self.by_image is None else self.by_image.to_json(),
        }


@dataclass(frozen=True)
class ArtifactReport:
    """The result of ``score_artifacts``.

    ``backend`` of a bundle, ``device`` of a PyTorch model. ``blocks``: token norms after each block of a PyTorch model.
    ``layers``: norm outliers of a bundle's further layers, by number of blocks.
    ``picture``: the first image, its features and its norms.
    """

    model: str
    scores: Scores
    picture: Image.Image
    backend: str | None = None
    device: str | None = None
    blocks: list[dict[str, float]] | None = None
    layers: dict[str, NormOutliers] | None = None

    def to_json(self) -> dict[str, Any]:
        optional = {name: plain(getattr(self, name)) for name in ("backend", "device", "blocks", "layers")}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": self.model, **self.scores.to_json(), **given}
