"""What ``artifacts`` does for a bundle, and for a PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from phreg_deploy.artifacts.scores import Scores, score
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.progress import Progress
from phreg_deploy.spec import parse_size
from phreg_deploy.student_record import model_path, read_record, recorded_median


def score_bundle(
    path: str,
    *,
    images: Path,
    checkpoint: Path | None,
    image_size: str | None,
    limit: int,
    median: float | None,
    device: str,
    backend: str,
    progress: Progress,
) -> tuple[dict[str, Any], Image.Image]:
    """Scores of a bundle, without PyTorch."""
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.verify.checking import bundle_run

    with FeatureExtractor.load(path, backend) as extractor:
        manifest = extractor.manifest
        size = parse_size(image_size) if image_size else manifest.sizes.default
        manifest.sizes.check(size, manifest.model.patch)
        photographs = read_photographs(images, size, manifest.preprocess, limit, say=progress.say)
        scores = score(
            bundle_run(extractor),
            photographs,
            manifest.model.patch,
            median=median or manifest.norm_median,
            progress=progress,
        )
        return {"model": path, "backend": extractor.backend, **scores.to_json()}, _sheet(photographs, scores)


def score_model(
    name: str,
    *,
    images: Path,
    checkpoint: Path | None,
    image_size: str | None,
    limit: int,
    median: float | None,
    device: str,
    backend: str,
    progress: Progress,
) -> tuple[dict[str, Any], Image.Image]:
    """Scores of a timm model or a student, block by block too."""
    from phreg_deploy.models.answers import block_norms, model_run
    from phreg_deploy.models.hardware import find_device
    from phreg_deploy.models.loading import load_model, model_preprocess

    where = find_device(device)
    model = load_model(name, checkpoint=checkpoint, image_size=parse_size(image_size) if image_size else None)
    folder = model_path(name)
    record = read_record(folder)
    preprocess, patch = model_preprocess(model), tuple(model.patch_embed.patch_size)
    photographs = read_photographs(images, tuple(model.patch_embed.img_size), preprocess, limit, say=progress.say)
    centre = median or (recorded_median(record, folder) if record else None)
    scores = score(model_run(model, preprocess, where), photographs, patch, median=centre, progress=progress)
    blocks = block_norms(model, photographs, preprocess, where)
    return {"model": name, "device": where, **scores.to_json(), "blocks": blocks}, _sheet(photographs, scores)


def _sheet(photographs: Photographs, scores: Scores) -> Image.Image:
    basis = components([scores.first_features])
    return sheet([[
        ("image", Image.fromarray(photographs.array(0))), ("features (PCA)", colours(scores.first_features, basis)),
        ("token norms, bright at 3x the median", heat(scores.first_norms, 3 * scores.norm_outliers.median)),
    ]])  # fmt: skip
