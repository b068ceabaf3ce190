"""Score a student beside its base model: token norms, fidelity to the denoised target, change of the class token."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from phreg_deploy.artifacts.measures import agreement_of, cosine, norm_outliers, outlier_mask
from phreg_deploy.distill.fake_quantisation import quantised
from phreg_deploy.distill.record import Fidelity, ModelScores, StudentScores
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.models.answers import block_norms, read_features
from phreg_deploy.models.batches import STEP, spread
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.readouts import readout_of, with_readout
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Grid
from phreg_deploy.readout import Readout
from phreg_deploy.spec import Preprocess

# Of the denoised target that fidelity is measured against.
REFERENCE_VIEWS = 20
REFERENCE_SEED = 12345
# At most so many photographs are scored; each costs the base model 23 forwards.
SCORED = 256


def score_student(
    base: ViT,
    student: ViT,
    photographs: Photographs,
    preprocess: Preprocess,
    *,
    device: str,
    progress: Progress,
    grids: dict[str, Grid] | None = None,
    teacher: Readout | None = None,
) -> StudentScores:
    """Compare base and student on photographs that the student was not trained on.

    At most ``SCORED`` photographs are used, evenly spaced. Features are in memory for ``STEP`` images at a time.
    Both are read out as the student is.

    Args:
        teacher: readout of the denoised targets; None for that of the student.
        grids: grids of fake quantisation; the student is then scored in fake INT8 too.
    """
    base = with_readout(base, readout_of(student))
    denoised = with_readout(base, teacher or readout_of(student))
    # In float32.
    denoiser = Teacher(denoised, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED, devices=[device])
    scored = spread(photographs, SCORED)
    measured = _Measurements()
    with progress.task("scoring", len(scored)) as advance:
        targets = denoiser.targets(scored, advance)
        for start in range(0, len(scored), STEP):
            part = scored.subset(range(start, min(start + STEP, len(scored))))
            target = np.stack([t.patches.astype(np.float32) for t in itertools.islice(targets, len(part))])
            features = {
                "base": read_features(base, part, preprocess, device),
                "student": read_features(student, part, preprocess, device),
            }
            if grids:
                with quantised(student, grids):
                    features["int8"] = read_features(student, part, preprocess, device)
            measured.add(features, target.reshape(len(part), -1, target.shape[-1]))
    median = float(np.median(measured.norms("base")))
    return StudentScores(
        images=len(scored),
        out_of=len(photographs),
        most=SCORED,
        views=denoiser.views,
        seed=REFERENCE_SEED,
        median_norm=median,
        base=measured.scores("base", median, block_norms(base, scored, preprocess, device)),
        student=measured.scores("student", median, block_norms(student, scored, preprocess, device)),
        int8=measured.scores("int8", median) if grids else None,
        class_cosine=measured.mean("class cosine"),
        top1_agreement=measured.mean("same top class"),
    )


class _Measurements:
    """Norms and cosines of every patch token, by model, and of every class token; collected batch by batch."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, features: dict[str, dict[str, np.ndarray]], target: np.ndarray) -> None:
        """Add a batch: features by model, as ``read_features`` returns them, and the target ``(B, N, C)``."""
        for name, of_model in features.items():
            self._arrays[f"norms of {name}"].append(of_model["norms"])
            self._arrays[f"cosines of {name}"].append(cosine(of_model["patches"], target))
        base, student = features["base"], features["student"]
        if "int8" in features:
            self._arrays["own"].append(cosine(features["int8"]["patches"], student["patches"]))
        if "cls" in base:
            self._arrays["class cosine"].append(cosine(student["cls"], base["cls"]))
        if "logits" in base:
            self._arrays["same top class"].append(student["logits"].argmax(1) == base["logits"].argmax(1))

    def norms(self, name: str) -> np.ndarray:
        return np.concatenate(self._arrays[f"norms of {name}"])

    def mean(self, name: str) -> float | None:
        return float(np.concatenate(self._arrays[name]).mean()) if name in self._arrays else None

    def scores(self, name: str, median: float, blocks: list[dict[str, float]] | None = None) -> ModelScores:
        """Score one model; outlier tokens are those of the base model, relative to its ``median`` norm."""
        cosines = np.concatenate(self._arrays[f"cosines of {name}"])
        fidelity = agreement_of(cosines, outlier_mask(self.norms("base"), median))
        own = agreement_of(np.concatenate(self._arrays["own"])) if name == "int8" else None
        return ModelScores(
            norm_outliers(self.norms(name), median),
            Fidelity(fidelity.mean, fidelity.p1, fidelity.chosen),
            blocks,
            {"mean": own.mean, "p1": own.p1} if own else None,
        )
