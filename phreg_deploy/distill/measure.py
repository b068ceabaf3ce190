"""What a PyTorch model's features are like: scores, norms block by block, and what a distillation kept and mended."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from phreg_deploy.artifacts import OUTLIER_FACTOR, agreement, cosine, norm_outliers, outlier_mask
from phreg_deploy.distill import taps
from phreg_deploy.distill.fake_quantisation import quantised
from phreg_deploy.distill.source import classifies
from phreg_deploy.distill.taps import ViT
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.photographs import Photographs
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Grid
from phreg_deploy.scores import Run
from phreg_deploy.spec import Preprocess

REFERENCE_VIEWS = 20  # of the denoised target that fidelity is measured against
REFERENCE_SEED = 12345
STEP = 16


def model_run(model: ViT, preprocess: Preprocess, device: str = "cpu") -> Run:
    """The model as ``scores.score`` calls it: uint8 images in, float32 features and norms out."""
    model = model.to(device).eval()
    grid = tuple(model.patch_embed.grid_size)

    @torch.inference_mode()
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = taps.forward(
            model,
            taps.normalise(torch.from_numpy(np.ascontiguousarray(images)).to(device), preprocess.mean, preprocess.std),
        )
        return seen.patches.cpu().numpy().reshape(len(images), *grid, -1), seen.norms.cpu().numpy().reshape(
            len(images), *grid
        )

    return run


@torch.inference_mode()
def read_features(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Of every photograph: ``patches`` ``(M, N, C)``, ``norms`` ``(M, N)``, ``cls`` ``(M, C)`` and ``logits`` where there are any."""
    model = model.to(device).eval()
    parts: dict[str, list[np.ndarray]] = {"patches": [], "norms": [], "cls": [], "logits": []}
    for start in range(0, len(photographs), STEP):
        images = torch.from_numpy(photographs.batch(start, start + STEP)).to(device)
        seen = taps.forward(model, taps.normalise(images, preprocess.mean, preprocess.std))
        parts["patches"].append(seen.patches.cpu().numpy())
        parts["norms"].append(seen.norms.cpu().numpy())
        if seen.cls is not None:
            parts["cls"].append(seen.cls.cpu().numpy())
        if classifies(model):
            parts["logits"].append(model.forward_head(seen.tokens).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items() if part}


@torch.inference_mode()
def block_norms(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> list[dict[str, float]]:
    """Per block, over patch tokens: ``median`` norm of its output, ``largest`` over that median, ``rate`` above twice it."""
    model = model.to(device).eval()
    norms: list[list[np.ndarray]] = [[] for _ in model.blocks]
    prefix = model.num_prefix_tokens
    with taps.block_outputs(model, lambda i, out: norms[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())):
        for start in range(0, len(photographs), STEP):
            images = torch.from_numpy(photographs.batch(start, start + STEP)).to(device)
            taps.forward(model, taps.normalise(images, preprocess.mean, preprocess.std))
    found = []
    for block in norms:
        values = np.concatenate(block)
        median = float(np.median(values))
        found.append(
            {
                "median": median,
                "largest": float(values.max() / median),
                "rate": float(np.mean(values > OUTLIER_FACTOR * median)),
            }
        )
    return found


def compare(
    base: ViT,
    student: ViT,
    photographs: Photographs,
    preprocess: Preprocess,
    *,
    device: str,
    autocast: bool,
    progress: Progress,
    grids: dict[str, Grid] | None = None,
) -> dict[str, Any]:
    """Base and student side by side on photographs that neither was trained on: norms, fidelity, class drift.

    Fidelity is the cosine to the base model's denoised target (20 views, or all that differ on a small grid; fixed seed); ``outliers`` is its mean over the
    base model's outlier tokens alone. With ``grids``, "int8" is the student in fake quantisation: its fidelity, its
    norms, and its agreement with its own float features.
    """
    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED, device=device, autocast=autocast)
    with progress.task("scoring: denoised targets", len(photographs)) as advance:
        target = np.stack([t.patches.astype(np.float32) for t in teacher.targets(photographs, advance)])
    target = target.reshape(len(target), -1, target.shape[-1])
    seen = {
        "base": read_features(base, photographs, preprocess, device),
        "student": read_features(student, photographs, preprocess, device),
    }
    median = float(np.median(seen["base"]["norms"]))
    outliers = outlier_mask(seen["base"]["norms"], median)
    report: dict[str, Any] = {
        "images": len(photographs),
        "views": teacher.views,
        "seed": REFERENCE_SEED,
        "median_norm": median,
    }
    for name, model in (("base", base), ("student", student)):
        fidelity = agreement(seen[name]["patches"], target, outliers)
        report[name] = {
            "norm_outliers": asdict(norm_outliers(seen[name]["norms"], median)),
            "fidelity": {"mean": fidelity.mean, "p1": fidelity.p1, "outliers": fidelity.chosen},
            "blocks": block_norms(model, photographs, preprocess, device),
        }
    if grids:
        with quantised(student, grids):
            eight = read_features(student, photographs, preprocess, device)
        fidelity, own = (
            agreement(eight["patches"], target, outliers),
            agreement(eight["patches"], seen["student"]["patches"]),
        )
        report["int8"] = {
            "norm_outliers": asdict(norm_outliers(eight["norms"], median)),
            "fidelity": {"mean": fidelity.mean, "p1": fidelity.p1, "outliers": fidelity.chosen},
            "own": {"mean": own.mean, "p1": own.p1},
        }
    if "cls" in seen["base"]:
        report["class_cosine"] = float(cosine(seen["student"]["cls"], seen["base"]["cls"]).mean())
    if "logits" in seen["base"]:
        report["top1_agreement"] = float(
            np.mean(seen["student"]["logits"].argmax(1) == seen["base"]["logits"].argmax(1))
        )
    return report
