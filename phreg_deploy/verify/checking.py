"""Compare a loaded bundle with its exam and with PyTorch models on photographs, and judge the parity by gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.measures import NormOutliers, norm_outliers
from phreg_deploy.artifacts.scores import Run, Scores, score
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat
from phreg_deploy.layers import ATTENTION
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.readout import Readout
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import (
    Gate,
    Parity,
    ParityAccumulator,
    gates_of,
    part_name,
    run_exam,
    worst,
    writes_exams,
)
from phreg_deploy.student_record import model_path, read_record, recorded
from phreg_deploy.verify.report import ArtifactRates, CheckReport, Comparison, Pictures

EXAM = "own reference"
Answers = Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 images -> a bundle's outputs by name


@dataclass(frozen=True)
class CheckRequest:
    """What to compare a bundle with; the fields are the arguments of ``phreg_deploy.verify.check``."""

    reference: str | None = None
    reference_checkpoint: Path | None = None
    base: str | None = None
    base_checkpoint: Path | None = None
    images: Path | None = None
    limit: int = 64
    cosine: float | None = None
    outlier_points: float | None = None


@dataclass(frozen=True)
class _OnImages:
    """What was measured on photographs. ``layers``: norm outliers of the bundle's further layers."""

    photographs: Photographs
    scores: dict[str, Scores]
    parity: dict[str, Parity]
    layers: dict[str, NormOutliers]


def check_extractor(extractor: FeatureExtractor, request: CheckRequest, progress: Progress = SILENT) -> CheckReport:
    """Run the exam, score the photographs if there are any, and compare all parities with their gates.

    Raises:
        PhregError: images, a model or a record that cannot be read. BackendMissing: PyTorch is not installed.
    """
    manifest = extractor.manifest
    comparisons = [
        Comparison(EXAM, f"{case.size[0]}x{case.size[1]}, batch {case.batch}{_part_name(part)}", parity)
        for case in run_exam(extractor.bundle, extractor.run)
        for part, parity in case.parts.items()
    ]
    measured = _measure(extractor, request, progress) if request.images is not None else None
    if measured is not None:
        height, width = manifest.sizes.default
        size = f"{height}x{width}, {len(measured.photographs)} images"
        for part, parity in measured.parity.items():
            comparisons.append(Comparison(f"PyTorch {request.reference}", f"{size}{_part_name(part)}", parity))
    quantisation = manifest.quantisation or {}
    return CheckReport(
        bundle=str(extractor.bundle.folder),
        backend=extractor.backend,
        compute=extractor.compute,
        choice=extractor.choice,
        precision=manifest.precision,
        images=len(measured.photographs) if measured else 0,
        comparisons=tuple(comparisons),
        artifacts=_artifacts(measured, extractor.backend, request.reference) if measured else {},
        gates=_gates(comparisons, extractor, request),
        quantised_fidelity=quantisation.get("fidelity"),
        missed_when_calibrated=tuple(quantisation.get("missed", ())),
        pictures=_pictures(measured) if measured else [],
    )


class BundleRun:
    """A bundle as ``scores.score`` calls it: uint8 images -> features and pre-norm token norms.

    It keeps the token norms of further layers for the first image of each call, which is the unshifted view.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._norms: dict[int, list[np.ndarray]] = {}

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dense = self.extractor.dense(np.ascontiguousarray(images))
        for block, layer in dense.layers.items():
            self._norms.setdefault(block, []).append(layer.token_norm[0])
        return dense.features, dense.token_norm

    def layers(self) -> dict[str, NormOutliers]:
        """The norm outliers of each further layer, against its own median over the images; by number of blocks."""
        return {str(block): norm_outliers(np.stack(norms)) for block, norms in self._norms.items()}


def _part_name(part: str) -> str:
    """How a comparison names a layer or the attention after the size; nothing for the last layer."""
    return f", {part_name(part)}" if part else ""


def _measure(extractor: FeatureExtractor, request: CheckRequest, progress: Progress) -> _OnImages:
    """Score base, student and bundle on the photographs, and compare the bundle with the student."""
    manifest, size = extractor.manifest, extractor.manifest.sizes.default
    assert request.images is not None
    photographs = read_photographs(request.images, size, manifest.preprocess, request.limit, say=progress.say)
    models = {
        name: _load_model(source, checkpoint, size, manifest.readout)
        for name, source, checkpoint in (
            ("base", request.base, request.base_checkpoint),
            ("student", request.reference, request.reference_checkpoint),
        )
        if source
    }
    scores: dict[str, Scores] = {}
    median = manifest.norm_median
    runs = {name: _model_run(model, extractor) for name, model in models.items()}
    own = BundleRun(extractor)
    runs["bundle"] = own
    for name, run in runs.items():
        scores[name] = score(
            run, photographs, manifest.model.patch, median=median, progress=progress, name=f"scoring {name}"
        )
        if name == "base":
            median = scores[name].norm_outliers.median
    parity = {}
    if "student" in models:
        from phreg_deploy.heads.answers import with_heads

        answers = with_heads(_answers(models["student"], extractor), extractor.bundle)
        parity = _parity_on_images(extractor, answers, photographs, median, progress)
    return _OnImages(photographs, scores, parity, own.layers())


def _load_model(source: str, checkpoint: Path | None, size: tuple[int, int], readout: Readout) -> Any:
    from phreg_deploy.models.loading import load_model
    from phreg_deploy.models.readouts import with_readout

    return with_readout(load_model(source, checkpoint=checkpoint, image_size=size), readout)


def _model_run(model: Any, extractor: FeatureExtractor) -> Run:
    from phreg_deploy.models.answers import model_run

    return model_run(model, extractor.manifest.preprocess)


def _answers(model: Any, extractor: FeatureExtractor) -> Answers:
    from phreg_deploy.models.answers import model_answers

    manifest = extractor.manifest
    attention = ATTENTION in manifest.outputs
    return model_answers(model, manifest.preprocess, layers=manifest.layers, attention=attention)


def _parity_on_images(
    extractor: FeatureExtractor, answers: Answers, photographs: Photographs, median: float | None, progress: Progress
) -> dict[str, Parity]:
    """Compare the bundle with ``answers`` on every photograph, in the largest batches that the bundle serves."""
    step, accumulator = extractor.manifest.batches.highest, ParityAccumulator(median)
    with progress.task("parity on images", len(photographs)) as advance:
        for start in range(0, len(photographs), step):
            batch = photographs.batch(start, start + step)
            accumulator.add(extractor.dense(batch).outputs(), answers(batch))
            advance(len(batch))
    return accumulator.parts()


def _artifacts(measured: _OnImages, backend: str, reference: str | None) -> dict[str, ArtifactRates]:
    """Artifact rates by model; those of a base model that was not given come from the student's record."""
    rates = {} if "base" in measured.scores or not reference else _recorded_base(reference)
    for name, scores in measured.scores.items():
        note = f"{backend if name == 'bundle' else 'PyTorch'}, these images"
        layers = measured.layers if name == "bundle" else {}
        rates[name] = ArtifactRates(scores.norm_outliers, scores.shift_incoherence, scores.images, note, layers)
    return rates


def _recorded_base(reference: str) -> dict[str, ArtifactRates]:
    """The base model's norm outliers as the student's record holds them, on other images."""
    folder = model_path(reference)
    record = read_record(folder)
    if record is None or "missing" in recorded(record, folder, "scores"):
        return {}
    outliers = NormOutliers.from_json(recorded(record, folder, "scores", "base", "norm_outliers"))
    images = recorded(record, folder, "scores", "images")
    return {"base": ArtifactRates(outliers, None, None, f"recorded at distillation, {images} other images")}


def _gates(comparisons: list[Comparison], extractor: FeatureExtractor, request: CheckRequest) -> dict[str, list[Gate]]:
    """The gates of each reference, on the worst of its comparisons."""
    again = writes_exams(extractor.manifest, extractor.backend)
    return {
        reference: gates_of(
            worst([c.parity for c in comparisons if c.reference == reference]),
            extractor.precision,
            request.cosine,
            request.outlier_points,
            exam=reference == EXAM,
            again=again,
        )
        for reference in dict.fromkeys(c.reference for c in comparisons)
    }


def _pictures(measured: _OnImages) -> Pictures:
    """For each model a row: the first image, its features and its token norms."""
    image = Image.fromarray(measured.photographs.array(0))
    top = 3 * next(iter(measured.scores.values())).norm_outliers.median
    return [
        [
            ("image", image),
            (f"{name}: features (PCA)", colours(scores.first_features, components([scores.first_features]))),
            (f"{name}: token norms", heat(scores.first_norms, top)),
        ]
        for name, scores in measured.scores.items()
    ]
