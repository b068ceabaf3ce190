"""Compare loaded bundles with their exams and with PyTorch models on photographs, and judge the parity by gates."""

from __future__ import annotations

from collections.abc import Mapping

from phreg_deploy.artifacts.measures import NormOutliers
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import Gate, gates_of, part_name, run_exam, worst, writes_exams
from phreg_deploy.student_record import model_path, read_record, recorded
from phreg_deploy.verify.maps import Maps
from phreg_deploy.verify.measuring import CheckRequest, OnImages, measure
from phreg_deploy.verify.report import ArtifactRates, CheckReport, Comparison

EXAM = "own exam"


def check_extractors(
    extractors: Mapping[str, FeatureExtractor], request: CheckRequest, progress: Progress = SILENT
) -> tuple[list[CheckReport], Maps | None]:
    """Check bundles together: their exams, the photographs if there are any, and every parity against its gates.

    Args:
        extractors: by name; they share one input size, preprocessing and readout.

    Returns:
        A report for each bundle, and the maps if ``request.pictures`` asks for them.

    Raises:
        PhregError: images, a model or a record that cannot be read. BackendMissing: PyTorch is not installed.
    """
    exams = {name: _exam(extractor) for name, extractor in extractors.items()}
    measured = measure(extractors, request, progress) if request.images is not None else None
    reports = [_report(name, extractors[name], exam, measured, request) for name, exam in exams.items()]
    return reports, measured.maps if measured else None


def _exam(extractor: FeatureExtractor) -> list[Comparison]:
    return [
        Comparison(EXAM, f"{case.size[0]}x{case.size[1]}, batch {case.batch}{_part_name(part)}", parity)
        for case in run_exam(extractor.bundle, extractor.run)
        for part, parity in case.parts.items()
    ]


def _report(
    name: str,
    extractor: FeatureExtractor,
    comparisons: list[Comparison],
    measured: OnImages | None,
    request: CheckRequest,
) -> CheckReport:
    """The report of one bundle: its exam, ``comparisons``, and what was measured."""
    manifest = extractor.manifest
    if measured is not None:
        height, width = manifest.sizes.default
        size = f"{height}x{width}, {len(measured.photographs)} images"
        for part, parity in measured.parity.get(name, {}).items():
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
        artifacts=_artifacts(name, measured, extractor.backend, request.reference) if measured else {},
        gates=_gates(comparisons, extractor, request),
        quantised_fidelity=quantisation.get("fidelity"),
        missed_when_calibrated=tuple(quantisation.get("missed", ())),
        by_image=measured.by_image.get(name) if measured else None,
    )


def _part_name(part: str) -> str:
    """How a comparison names a layer or the attention after the size; nothing for the last layer."""
    return f", {part_name(part)}" if part else ""


def _artifacts(bundle: str, measured: OnImages, backend: str, reference: str | None) -> dict[str, ArtifactRates]:
    """Artifact rates by "base", "student" and "bundle"; those of a base that was not given come from the record."""
    rates = {} if "base" in measured.scores or not reference else _recorded_base(reference)
    for name in ("base", "student", bundle):
        if name in measured.scores:
            scores = measured.scores[name]
            note = f"{backend if name == bundle else 'PyTorch'}, these images"
            layers = measured.layers[name] if name == bundle else {}
            key = "bundle" if name == bundle else name
            rates[key] = ArtifactRates(scores.norm_outliers, scores.shift_incoherence, scores.images, note, layers)
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
