"""What ``check`` does: the bundle's own exam, and the same images through PyTorch where a reference is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.scores import Run, Scores, score
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import ParityAccumulator, gates_of, run_exam, worst, writes_exams
from phreg_deploy.student_record import model_path, read_record, recorded

OWN = "own reference"
Answers = Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 images -> what a bundle gives of them, by name
Pictures = list[list[tuple[str, Image.Image]]]


def bundle_run(extractor: FeatureExtractor) -> Run:
    """A bundle as ``scores.score`` calls it."""

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dense = extractor.dense(np.ascontiguousarray(images))
        return dense.features, dense.token_norm

    return run


def run_check(
    extractor: FeatureExtractor,
    *,
    reference: str | None = None,
    reference_checkpoint: Path | None = None,
    base: str | None = None,
    base_checkpoint: Path | None = None,
    images: Path | None = None,
    limit: int = 64,
    gates: tuple[float | None, float | None] = (None, None),
    progress: Progress = SILENT,
) -> tuple[dict[str, Any], Pictures]:
    """Parity with the bundle's own reference, and on ``images`` artifact rates and parity with a PyTorch ``reference``.

    Args:
        reference, base: a student's folder or a timm name, each with its checkpoint where it needs one.
        gates: 1st-percentile cosine and change of the norm-outlier rate in points; None for the precision's own.

    Returns:
        The report, with all ``gates``, ``missed`` as sentences and ``passed``, and pictures of the first image where there are images.
    """
    manifest, size = extractor.manifest, extractor.manifest.sizes.default
    comparisons: list[dict[str, Any]] = [
        {"with": OWN, "size": f"{c.size[0]}x{c.size[1]}, batch {c.batch}", "parity": c.parity}
        for c in run_exam(extractor.bundle, extractor.run)
    ]
    scored: dict[str, tuple[Scores, str]] = {}
    photographs: Photographs | None = None
    if images is not None:
        photographs = read_photographs(images, size, manifest.preprocess, limit, say=progress.say)
        models = {
            name: _model(source, weights, size)
            for name, source, weights in (("base", base, base_checkpoint), ("student", reference, reference_checkpoint))
            if source
        }
        median = manifest.norm_median
        for name, model in models.items():
            run = _model_run(model, extractor)
            scored[name] = (
                score(run, photographs, manifest.model.patch, median=median, progress=progress, name=f"scoring {name}"),
                "PyTorch, these images",
            )
            median = scored["base"][0].norm_outliers.median if name == "base" else median
        scored["bundle"] = (
            score(
                bundle_run(extractor),
                photographs,
                manifest.model.patch,
                median=median,
                progress=progress,
                name="scoring bundle",
            ),
            f"{extractor.backend}, these images",
        )
        if "student" in models:
            parity = _on_photographs(extractor, _answers(models["student"], extractor), photographs, median, progress)
            comparisons.append(
                {
                    "with": f"PyTorch {reference}",
                    "size": f"{size[0]}x{size[1]}, {len(photographs)} images",
                    "parity": parity,
                }
            )
    judged = {
        name: gates_of(
            worst(found),
            extractor.precision,
            *gates,
            exam=name == OWN,
            again=writes_exams(extractor.manifest, extractor.backend),
        )
        for name in dict.fromkeys(c["with"] for c in comparisons)
        if (found := [c["parity"] for c in comparisons if c["with"] == name])
    }
    missed = [str(gate) for found in judged.values() for gate in found if not gate.passed]
    document: dict[str, Any] = {
        "bundle": str(extractor.bundle.folder), "backend": extractor.backend, "compute": extractor.compute, "choice": extractor.choice, "precision": manifest.precision, "images": len(photographs) if photographs else 0,
        "comparisons": [{**c, "parity": c["parity"].to_json()} for c in comparisons],
        "artifacts": {name: {**s.to_json(), "note": note} for name, (s, note) in scored.items()},
        "gates": [{"with": name, **gate.to_json()} for name, found in judged.items() for gate in found],
        "missed": missed, "passed": not missed,
        "quantised_fidelity": manifest.quantisation["fidelity"] if manifest.quantisation else None,
    }  # fmt: skip
    if photographs is not None and "base" not in scored and reference:
        document["artifacts"] = {**_recorded(reference), **document["artifacts"]}
    return document, _pictures(photographs, {name: s for name, (s, _) in scored.items()})


def _model(source: str, weights: Path | None, size: tuple[int, int]) -> Any:
    from phreg_deploy.models.loading import load_model

    return load_model(source, checkpoint=weights, image_size=size)


def _model_run(model: Any, extractor: FeatureExtractor) -> Run:
    from phreg_deploy.models.answers import model_run

    return model_run(model, extractor.manifest.preprocess)


def _answers(model: Any, extractor: FeatureExtractor) -> Answers:
    from phreg_deploy.models.answers import model_answers

    return model_answers(model, extractor.manifest.preprocess)


def _recorded(reference: str) -> dict[str, Any]:
    """The base model's figures as the student's record has them: other images, so the note says which."""
    folder = model_path(reference)
    record = read_record(folder)
    if record is None or "missing" in recorded(record, folder, "scores"):
        return {}
    return {
        "base": {
            "norm_outliers": recorded(record, folder, "scores", "base", "norm_outliers"),
            "shift_incoherence": {"rate": None},
            "note": f"recorded at distillation, {recorded(record, folder, 'scores', 'images')} other images",
        }
    }


def _on_photographs(
    extractor: FeatureExtractor, answers: Answers, photographs: Photographs, median: float | None, progress: Progress
) -> Any:
    """Parity on real images, in batches that the bundle serves."""
    step, tally = extractor.manifest.batches.highest, ParityAccumulator(median)
    with progress.task("parity on images", len(photographs)) as advance:
        for start in range(0, len(photographs), step):
            batch = photographs.batch(start, start + step)
            dense = extractor.dense(batch)
            got = {"features": dense.features, "token_norm": dense.token_norm, "cls": dense.cls}
            tally.add({name: value for name, value in got.items() if value is not None}, answers(batch))
            advance(len(batch))
    return tally.parity()


def _pictures(photographs: Photographs | None, scored: dict[str, Scores]) -> Pictures:
    if photographs is None or not scored:
        return []
    shown = Image.fromarray(photographs.array(0))
    top = 3 * next(iter(scored.values())).norm_outliers.median
    rows: Pictures = []
    for name, scores in scored.items():
        basis = components([scores.first_features])
        rows.append(
            [
                ("image", shown),
                (f"{name}: features (PCA)", colours(scores.first_features, basis)),
                (f"{name}: token norms", heat(scores.first_norms, top)),
            ]
        )
    return rows
