"""What a PyTorch model's features are like: scores, norms block by block, and what a distillation kept and mended."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import agreement_of, cosine, norm_outliers, outlier_mask
from phreg_deploy.distill.fake_quantisation import quantised
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.models.answers import block_norms, read_features
from phreg_deploy.models.batches import STEP, spread
from phreg_deploy.models.hooks import ViT
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Grid
from phreg_deploy.spec import Preprocess

REFERENCE_VIEWS = 20  # of the denoised target that fidelity is measured against
REFERENCE_SEED = 12345
SCORED = 256  # photographs that a student is scored on at most; each costs the base model 23 forwards


def compare(
    base: ViT,
    student: ViT,
    photographs: Photographs,
    preprocess: Preprocess,
    *,
    device: str,
    progress: Progress,
    grids: dict[str, Grid] | None = None,
) -> dict[str, Any]:
    """Base and student side by side on photographs that neither was trained on: norms, fidelity, class drift.

    Of more than ``SCORED`` photographs, that many are taken, evenly spaced. Features are held for ``STEP`` images at a time.

    Fidelity is the cosine to the base model's denoised target (20 views, or all that differ on a small grid; fixed seed); ``outliers`` is its mean over the
    base model's outlier tokens alone. With ``grids``, "int8" is the student in fake quantisation: its fidelity, its
    norms, and its agreement with its own float features.
    """
    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED, device=device)  # in float32
    scored = spread(photographs, SCORED)
    names = ("base", "student", *(["int8"] if grids else []))
    norms: dict[str, list[np.ndarray]] = {name: [] for name in names}
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "own", "cls", "same")}
    with progress.task("scoring", len(scored)) as advance:
        targets = teacher.targets(scored, advance)
        for start in range(0, len(scored), STEP):
            part = scored.subset(range(start, min(start + STEP, len(scored))))
            target = np.stack([t.patches.astype(np.float32) for t in itertools.islice(targets, len(part))])
            target = target.reshape(len(part), -1, target.shape[-1])
            seen = {
                name: read_features(model, part, preprocess, device)
                for name, model in (("base", base), ("student", student))
            }
            if grids:
                with quantised(student, grids):
                    seen["int8"] = read_features(student, part, preprocess, device)
                cosines["own"].append(cosine(seen["int8"]["patches"], seen["student"]["patches"]))
            for name in names:
                norms[name].append(seen[name]["norms"])
                cosines[name].append(cosine(seen[name]["patches"], target))
            if "cls" in seen["base"]:
                cosines["cls"].append(cosine(seen["student"]["cls"], seen["base"]["cls"]))
            if "logits" in seen["base"]:
                cosines["same"].append(seen["student"]["logits"].argmax(1) == seen["base"]["logits"].argmax(1))
    all_norms = {name: np.concatenate(parts) for name, parts in norms.items()}
    values = {name: np.concatenate(parts) for name, parts in cosines.items() if parts}
    median = float(np.median(all_norms["base"]))
    outliers = outlier_mask(all_norms["base"], median)
    report: dict[str, Any] = {
        "images": len(scored),
        "out_of": len(photographs),
        "most": SCORED,
        "views": teacher.views,
        "seed": REFERENCE_SEED,
        "median_norm": median,
    }
    for name in names:
        fidelity = agreement_of(values[name], outliers)
        report[name] = {
            "norm_outliers": asdict(norm_outliers(all_norms[name], median)),
            "fidelity": {"mean": fidelity.mean, "p1": fidelity.p1, "outliers": fidelity.chosen},
        }
    for name, model in (("base", base), ("student", student)):
        report[name]["blocks"] = block_norms(model, scored, preprocess, device)
    if grids:
        own = agreement_of(values["own"])
        report["int8"]["own"] = {"mean": own.mean, "p1": own.p1}
    if "cls" in values:
        report["class_cosine"] = float(values["cls"].mean())
    if "same" in values:
        report["top1_agreement"] = float(values["same"].mean())
    return report
