"""Check a bundle against its exam and against PyTorch, and score the artifacts of a model or a bundle.

``bisection`` finds the block at which a backend leaves FP32; ``phreg_deploy.explorer`` draws a check as a page.
Importing this module imports neither a runtime nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.arguments import check_cosine, check_device, check_model
from phreg_deploy.errors import PhregError
from phreg_deploy.extras import DISTILL, require
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.student_record import read_readout

if TYPE_CHECKING:
    from phreg_deploy.runtime.backends.options import BackendOptions
    from phreg_deploy.verify.report import ArtifactReport, CheckReport

__all__ = ["check", "score_artifacts"]


def check(
    bundle: Path | str,
    *,
    backend: str = "auto",
    options: BackendOptions | None = None,
    reference: str | None = None,
    reference_checkpoint: Path | None = None,
    base: str | None = None,
    base_checkpoint: Path | None = None,
    images: Path | None = None,
    limit: int = 64,
    cosine: float | None = None,
    outlier_points: float | None = None,
    progress: Progress = SILENT,
) -> CheckReport:
    """Compare a bundle's answers with its exam and, on ``images``, with PyTorch; measure its artifact rates.

    Only ``reference`` and ``base`` need PyTorch. A missed gate is in the report; it is not raised.

    Args:
        backend: a backend's name, or "auto" for the fastest that passes the exam.
        options: threads, precision, mode and device of the backend.
        reference, base: the student and the model that it was distilled from, each a folder or a timm name; a timm name
            may come with a checkpoint.
        images: folder of photographs, of which the first ``limit`` are read.
        cosine: gate on the 1st-percentile patch cosine; None for the gate of the bundle's precision.
        outlier_points: gate on the change of the norm-outlier rate, in percentage points; None as for ``cosine``.

    Raises:
        PhregError: bad arguments, or a damaged bundle.
        BackendMissing: the backend, or PyTorch for a model, is not installed.
    """
    from phreg_deploy.bundle.bundle import Bundle

    models = {"reference": (reference, reference_checkpoint), "base": (base, base_checkpoint)}
    check_inputs("check", models, images, cosine)
    manifest = Bundle.read(bundle).manifest
    if cosine is not None:
        manifest.need_features("check: --cosine", "Leave the bar out, or check the bundle that has features too.")
    require_models("`phreg-deploy check --reference` or --base", models, backend)
    from phreg_deploy.runtime.backends.options import BackendOptions as Options
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.verify.checking import check_extractors
    from phreg_deploy.verify.measuring import CheckRequest

    request = CheckRequest(
        reference, reference_checkpoint, base, base_checkpoint, images, limit, cosine, outlier_points
    )
    how = asdict(options or Options())
    with FeatureExtractor.load(bundle, backend, examine=False, **how) as extractor:
        (report,), _ = check_extractors({"bundle": extractor}, request, progress)
        return report


def check_inputs(
    verb: str, models: Mapping[str, tuple[str | None, Path | None]], images: Path | None, cosine: float | None
) -> None:
    """Check the arguments of ``check`` and of a page of it, before anything slow.

    Args:
        models: a name and a checkpoint, or None, by option ("reference", "base").

    Raises:
        PhregError: a model without images, a checkpoint without a model, or what ``check_model`` refuses.
    """
    from phreg_deploy.images.photographs import list_images

    check_cosine(cosine)
    for option, (model, checkpoint) in models.items():
        if checkpoint and not model:
            raise PhregError(f"{verb}: --{option}-checkpoint holds the weights of a timm name; give it as --{option}.")
        if model and not images:
            raise PhregError(f"{verb}: --{option} needs --images DIR to compare on.")
        if model:
            check_model(model, checkpoint)
    if images is not None:
        list_images(images)


def require_models(what: str, models: Mapping[str, tuple[str | None, Path | None]], backend: str) -> None:
    """Raise ``BackendMissing`` if a PyTorch model is given, and PyTorch or every backend is missing."""
    if any(model for model, _ in models.values()):
        require(what, distill=DISTILL, **_runtime_extra(backend))


def score_artifacts(
    model: str,
    images: Path | str,
    *,
    checkpoint: Path | None = None,
    image_size: str | None = None,
    limit: int = 64,
    median: float | None = None,
    readout: str | None = None,
    project: bool | None = None,
    device: str = "auto",
    backend: str = "auto",
    progress: Progress = SILENT,
) -> ArtifactReport:
    """Measure the artifacts in the dense features of a timm model, a student or a bundle.

    Args:
        model: a timm name, or the folder of a student or a bundle.
        images: folder of photographs, of which the first ``limit`` are read.
        checkpoint: weights for a timm name.
        image_size: "518" or "480x640" (height x width); None for the model's own size.
        median: the base model's median norm; None for the recorded one, else the model's own on these images.
        readout, project: what is read out of a PyTorch model (``phreg_deploy.readout``); None for what a student's
            record says, else the final tokens. A bundle has a readout of its own, and refuses them.
        device: where PyTorch computes; a bundle takes ``backend`` instead, and refuses ``device``.
        backend: what serves a bundle; a PyTorch model refuses it.

    Raises:
        PhregError: bad arguments, or an argument that this kind of model does not use.
        BackendMissing: the backend or PyTorch is not installed.
    """
    from phreg_deploy.bundle.bundle import is_bundle
    from phreg_deploy.images.photographs import list_images
    from phreg_deploy.spec import parse_size

    size, images = parse_size(image_size) if image_size else None, Path(images)
    check_device(device)
    if is_bundle(model):
        if checkpoint is not None:
            raise PhregError(f"artifacts: --checkpoint goes with a timm name, but {model} is a bundle.")
        if device != "auto":
            raise PhregError("artifacts: --device goes with a PyTorch model; a bundle runs where --backend says.")
        if readout is not None or project is not None:
            raise PhregError("artifacts: --readout and --project go with a PyTorch model; a bundle has its own.")
        list_images(images)
        from phreg_deploy.verify.scoring import score_bundle

        return score_bundle(model, images, size=size, limit=limit, median=median, backend=backend, progress=progress)
    check_model(model, checkpoint)
    asked = read_readout(model, readout, project)
    if backend != "auto":
        raise PhregError(f"artifacts: --backend goes with a bundle, but {model} is none; it runs in PyTorch.")
    list_images(images)
    require("`phreg-deploy artifacts` of a PyTorch model", distill=DISTILL)
    from phreg_deploy.verify.scoring import ModelRequest, score_model

    return score_model(ModelRequest(model, checkpoint, size, device, asked), images, limit, median, progress)


def _runtime_extra(backend: str) -> dict[str, tuple[str, ...]]:
    """Name the extra "cpu" and its module if "auto" has no backend to choose from."""
    from phreg_deploy.runtime.backends.registry import BACKENDS, is_installed

    return {} if backend != "auto" or any(is_installed(name) for name in BACKENDS) else {"cpu": ("onnxruntime",)}
