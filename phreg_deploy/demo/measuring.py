"""Measure base model, student and served bundles on scenes that nothing was trained on, and draw the first few."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.measures import agreement, outlier_mask
from phreg_deploy.demo.linear_probe import LinearProbe, mean_iou, patch_labels
from phreg_deploy.demo.report import Figures
from phreg_deploy.demo.scenes import CLASSES, make_scene
from phreg_deploy.distill.evaluation import REFERENCE_SEED, REFERENCE_VIEWS
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat
from phreg_deploy.models.answers import block_norms, read_features
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.runtime.features import FeatureExtractor

# Scenes in the picture.
SHOWN = 4
# "patches" (M, N, C) and "norms" (M, N) of M scenes.
Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scenes:
    """``photographs`` at the input size, and the majority class of each of their patches, ``labels`` ``(M, N)``."""

    photographs: Photographs
    labels: np.ndarray

    @classmethod
    def read(cls, folder: Path, seeds: range, model: ViT) -> Scenes:
        """Read the scenes that were drawn from ``seeds``."""
        size = tuple(model.patch_embed.img_size)
        photographs = read_photographs(folder, size, model_preprocess(model))
        masks = np.stack([make_scene(seed, size[0])[1] for seed in seeds])
        labels = patch_labels(masks, model.patch_embed.patch_size[0], len(CLASSES))
        return cls(photographs, labels.reshape(len(labels), -1))


@dataclass(frozen=True)
class Measured:
    """Features on the test scenes and figures, both by model; and the base model's median norm."""

    features: dict[str, Features]
    figures: dict[str, Figures]
    median: float


def measure(
    models: dict[str, ViT], extractors: dict[str, FeatureExtractor], probe_scenes: Scenes, test_scenes: Scenes
) -> Measured:
    """Measure every model and bundle.

    Args:
        models: PyTorch models; "base" is the one that the others are compared with.
        probe_scenes: a linear probe is fitted to these.
        test_scenes: figures are measured on these.
    """
    base, photographs = models["base"], test_scenes.photographs
    preprocess = model_preprocess(base)
    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED)
    target = np.stack([t.patches for t in teacher.targets(photographs)])
    target = target.reshape(len(target), -1, target.shape[-1])
    features: dict[str, tuple[Features, Features]] = {}
    for name, model in models.items():
        features[name] = (
            read_features(model, probe_scenes.photographs, preprocess),
            read_features(model, photographs, preprocess),
        )
    for name, extractor in extractors.items():
        features[name] = (_serve(extractor, probe_scenes.photographs), _serve(extractor, photographs))
    base_norms = features["base"][1]["norms"]
    median = float(np.median(base_norms))
    outliers = outlier_mask(base_norms, median)
    figures: dict[str, Figures] = {}
    for name, (fit, test) in features.items():
        probe = LinearProbe.fit(fit["patches"], probe_scenes.labels, len(CLASSES))
        blocks = block_norms(models[name], photographs, preprocess) if name in models else None
        figures[name] = _figures(test, target, outliers, median, probe.predict(test["patches"]), test_scenes, blocks)
    return Measured({name: test for name, (_, test) in features.items()}, figures, median)


def _figures(
    features: Features,
    target: np.ndarray,
    outliers: np.ndarray,
    median: float,
    predicted: np.ndarray,
    scenes: Scenes,
    blocks: list[dict[str, float]] | None,
) -> Figures:
    """Compute one model's figures from the base model's ``outliers`` and the probe's ``predicted``, ``(M, N)``."""
    correct = predicted == scenes.labels
    fidelity = agreement(features["patches"], target, outliers)
    return Figures(
        norm_outlier_rate=float(outlier_mask(features["norms"], median).mean()),
        largest_norm=float(features["norms"].max() / median),
        worst_block=max(block["largest"] for block in blocks) if blocks else None,
        fidelity=fidelity.mean,
        fidelity_outliers=fidelity.chosen,
        probe_accuracy=float(correct.mean()),
        probe_accuracy_outliers=float(correct[outliers].mean()),
        probe_miou=mean_iou(predicted, scenes.labels, len(CLASSES)),
    )


def _serve(extractor: FeatureExtractor, photographs: Photographs) -> Features:
    dense = extractor.dense(photographs.batch(0, len(photographs)))
    return {
        "patches": dense.features.reshape(len(photographs), -1, dense.features.shape[-1]),
        "norms": dense.token_norm.reshape(len(photographs), -1),
    }


def draw_rows(
    photographs: Photographs, measured: Measured, patch: tuple[int, int]
) -> list[list[tuple[str, Image.Image]]]:
    """Draw one row per scene: image, features and norms of the base model, features and norms as served."""
    grid = tuple(size // p for size, p in zip(photographs.size, patch))
    # One basis for both, so that equal features have equal colours.
    basis = components(list(measured.features["served"]["patches"][:SHOWN]))
    rows = []
    for i in range(SHOWN):
        row = [("scene", Image.fromarray(photographs.array(i)))]
        for name, caption in (("base", "before"), ("served", "after")):
            features = measured.features[name]["patches"][i].reshape(*grid, -1)
            norms = measured.features[name]["norms"][i].reshape(grid)
            row += [
                (f"features {caption}", colours(features, basis)),
                (f"norms {caption}", heat(norms, 3 * measured.median)),
            ]
        rows.append(row)
    return rows
