"""The record of a student, ``phreg.json``: recipe, source, images, register neurons, losses and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phreg_deploy.artifacts.measures import NormOutliers
from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.distill.recipes import Recipe
from phreg_deploy.spec import Preprocess, Stored, plain


@dataclass(frozen=True)
class Fidelity(Stored):
    """Cosine per patch token to the denoised target: mean, 1st percentile, mean over the base's outlier tokens."""

    mean: float
    p1: float
    outliers: float | None


@dataclass(frozen=True)
class ModelScores(Stored):
    """Scores of one model.

    ``blocks``: token norms after each block. ``own``: of a student in fake INT8, mean and 1st percentile ("p1") of the
    cosine per patch token to its own float features.
    """

    norm_outliers: NormOutliers
    fidelity: Fidelity
    blocks: list[dict[str, float]] | None = None
    own: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(super().to_json(), "blocks", "own")


@dataclass(frozen=True)
class StudentScores(Stored):
    """Base model and student on ``images`` of ``out_of`` photographs; at most ``most`` are scored.

    ``views``, ``seed``: of the denoised targets. ``median_norm``: the base model's median patch-token norm. ``int8``:
    the student in fake quantisation. ``class_cosine``: mean cosine of the class tokens, None without class token.
    ``top1_agreement``: share of images with the same top class, 0-1, None without classifier.
    """

    images: int
    out_of: int
    most: int
    views: int
    seed: int
    median_norm: float
    base: ModelScores
    student: ModelScores
    int8: ModelScores | None = None
    class_cosine: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(super().to_json(), "int8", "class_cosine", "top1_agreement")


@dataclass(frozen=True)
class History(Stored):
    """Mean loss of every epoch; ``steps_per_epoch`` is None if nothing was trained."""

    loss: list[float]
    steps_per_epoch: int | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(super().to_json(), "steps_per_epoch")


@dataclass(frozen=True)
class TrainingImages(Stored):
    """Number and digest of the images trained on, names of the held-out ones, number of unreadable files."""

    trained: int
    digest: str
    held_out: list[str]
    skipped: int


@dataclass(frozen=True)
class Seconds(Stored):
    """Seconds in all and for the teacher's targets, and how many targets were computed rather than read."""

    total: float
    targets: float
    targets_computed: int


@dataclass(frozen=True)
class StudentRecord:
    """What a distillation did and measured.

    ``source``: the base model, its licence, and the digest of its weights. ``strength``: of transplanted neurons, None
    if the recipe moves none. ``image_size``: (height, width). ``register_neurons``: each with the reason why it was not
    moved, or None. ``processes``: those that trained together; each had a device like ``devices`` of the first one.
    ``scores``: None if the student could not be scored; ``missing_scores`` then holds the reason.
    """

    source: dict[str, str | None]
    recipe: Recipe
    strength: float | None
    views: int
    seed: int
    preprocess: Preprocess
    image_size: tuple[int, int]
    autocast: bool
    devices: tuple[str, ...]
    images: TrainingImages
    register_neurons: dict[RegisterNeuron, str | None]
    history: History
    seconds: Seconds
    versions: dict[str, str]
    processes: int = 1
    scores: StudentScores | None = None
    missing_scores: str = "the run ended before scoring did"

    @property
    def registers(self) -> int:
        return self.recipe.registers

    def to_json(self) -> dict[str, Any]:
        """The content of ``phreg.json``."""
        fields = {name: value for name, value in vars(self).items() if name not in ("devices", "missing_scores")}
        return {
            **plain(fields),
            "registers": self.registers,
            "readout": self.recipe.student_readout.to_json(),
            "device": ",".join(self.devices),
            "register_neurons": [{**n.to_json(), "left": reason} for n, reason in self.register_neurons.items()],
            "scores": self.scores.to_json() if self.scores else {"missing": self.missing_scores},
        }


def _without_none(document: dict[str, Any], *optional: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None or name not in optional}
