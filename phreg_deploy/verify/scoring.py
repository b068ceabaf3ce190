"""Score the artifacts of a bundle without PyTorch, or of a PyTorch model block by block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.scores import Scores, score
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.progress import Progress
from phreg_deploy.readout import Readout
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.student_record import model_path, read_record, recorded_median, recorded_readout
from phreg_deploy.verify.measuring import BundleRun
from phreg_deploy.verify.report import ArtifactReport


@dataclass(frozen=True)
class ModelRequest:
    """A PyTorch model: a timm name or a student's folder, weights for a timm name, (height, width), device, readout."""

    name: str
    checkpoint: Path | None
    size: tuple[int, int] | None
    device: str
    readout: Readout


def score_bundle(
    path: str,
    images: Path,
    *,
    size: tuple[int, int] | None,
    limit: int,
    median: float | None,
    backend: str,
    progress: Progress,
) -> ArtifactReport:
    """Score a bundle at ``size`` (height, width), by default its own; arguments as of ``verify.score_artifacts``."""
    with FeatureExtractor.load(path, backend) as extractor:
        manifest = extractor.manifest
        size = size or manifest.sizes.default
        manifest.sizes.check(size, manifest.model.patch)
        photographs = read_photographs(images, size, manifest.preprocess, limit, say=progress.say)
        centre = median or manifest.norm_median
        run = BundleRun(extractor)
        scores = run.score(photographs, centre, progress)
        sheet = _sheet(photographs, scores)
        return ArtifactReport(path, scores, sheet, backend=extractor.backend, layers=run.layers() or None)


def score_model(
    request: ModelRequest, images: Path, limit: int, median: float | None, progress: Progress
) -> ArtifactReport:
    """Score a timm model or a student, and measure the token norms after each block."""
    from phreg_deploy.models.answers import block_norms, model_run
    from phreg_deploy.models.hardware import find_device
    from phreg_deploy.models.loading import load_model, model_preprocess
    from phreg_deploy.models.readouts import with_readout

    device = find_device(request.device)
    model = load_model(request.name, checkpoint=request.checkpoint, image_size=request.size)
    model = with_readout(model, request.readout)
    folder = model_path(request.name)
    record = read_record(folder)
    preprocess, patch = model_preprocess(model), tuple(model.patch_embed.patch_size)
    photographs = read_photographs(images, tuple(model.patch_embed.img_size), preprocess, limit, say=progress.say)
    # Norms of another readout are not comparable.
    known = record is not None and recorded_readout(record, folder) == request.readout
    centre = median or (recorded_median(record, folder) if record is not None and known else None)
    scores = score(model_run(model, preprocess, device), photographs, patch, median=centre, progress=progress)
    outliers = scores.norm_outliers
    if not np.isfinite([outliers.median, outliers.largest]).all():
        raise PhregError(
            f"model: the token norms of {request.name} hold NaN or infinite values; expected finite ones. "
            "Its weights may be damaged: compare them with another copy."
        )
    blocks = block_norms(model, photographs, preprocess, device)
    return ArtifactReport(request.name, scores, _sheet(photographs, scores), device=device, blocks=blocks)


def _sheet(photographs: Photographs, scores: Scores) -> Image.Image:
    """The first image, its features where there are any, and its token norms side by side."""
    row = [("image", Image.fromarray(photographs.array(0)))]
    if scores.first_features is not None:
        row.append(("features (PCA)", colours(scores.first_features, components([scores.first_features]))))
    norms = heat(scores.first_norms, 3 * scores.norm_outliers.median)
    return sheet([[*row, ("token norms, bright at 3x the median", norms)]])
