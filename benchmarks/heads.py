r"""Measure heads in bundles on CamVid: base, student and INT8 student, label changes, finer maps, and their cost.

    python -m benchmarks.heads NAME --checkpoint WEIGHTS --student STUDENT --data DIR --json OUT

Images are cut to 352 x 480 pixels. A linear head for each model is trained on patches of ``DIR/camvid_train`` (logistic
regression, ``evaluation.solvers``), on the model's own features in FP32; the INT8 bundle, calibrated on
``camvid_train``, serves the head of its FP32 student. ``camvid_val`` is read on: it took part in no choice. Answers at
a stride of 4 are repeated to pixels. Intervals are of a bootstrap over frames.

- ``changes``: share of pixels whose class differs between the FP32 and the INT8 bundle.
- ``boundary``: F-score of the classes' borders, within 4 pixels (0.75 % of the diagonal), as in Csurka et al. (BMVC
  2013), mean over classes and frames.
- ``cost``: milliseconds that a head adds, from interleaved rounds; a ratio is the median over rounds.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from PIL import Image
from segmentation import CLASSES, SIZE, VOID, mean_iou

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration import calibrate
from phreg_deploy.demo.linear_probe import patch_labels
from phreg_deploy.evaluation.scores import class_row
from phreg_deploy.evaluation.solvers import fit_classes
from phreg_deploy.export import export
from phreg_deploy.heads import Head, attach
from phreg_deploy.models.loading import load_model
from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor

DECAY, RESAMPLES, TOLERANCE = 1e-4, 2000, 4
MAPS: dict[str, tuple[str, int]] = {
    "bilinear, stride 1": ("bilinear", 1),
    "bilinear, stride 4": ("bilinear", 4),
    "joint bilateral, stride 4": ("joint-bilateral", 4),
    "joint bilateral, stride 1": ("joint-bilateral", 1),
}
NAMES = tuple(f"class {k}" for k in range(CLASSES))
COST_SIZES = ("224", "352x480")


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path))[: SIZE[0], : SIZE[1]] for path in sorted(folder.iterdir())])


def run(bundle: Path, images: np.ndarray, output: str, backend: str, threads: int) -> np.ndarray:
    with FeatureExtractor.load(bundle, backend, threads=threads) as extractor:
        return np.concatenate([extractor.run(image[None])[output] for image in images])


def train(features: np.ndarray, labels: np.ndarray) -> Head:
    known = labels != VOID
    fit = fit_classes(features[known], labels[known], CLASSES, "logistic", DECAY)
    return Head(fit.weight, fit.bias, classes=NAMES)


def borders(mask: np.ndarray) -> np.ndarray:
    return mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).astype(bool)


def boundary(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The mean F-score of the borders of one frame's classes."""
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * TOLERANCE + 1, 2 * TOLERANCE + 1))
    scores = []
    for k in range(CLASSES):
        own, wanted = borders((predicted == k) & (truth != VOID)), borders(truth == k)
        if wanted.any():
            near_wanted, near_own = (cv2.dilate(b.astype(np.uint8), disk) > 0 for b in (wanted, own))
            right, found = (own & near_wanted).sum(), (wanted & near_own).sum()
            precision, recall = right / max(own.sum(), 1), found / wanted.sum()
            scores.append(2 * precision * recall / max(precision + recall, 1e-9))
    return float(np.mean(scores))


def figures(predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    known = np.where(truth == VOID, 255, truth)
    rows = np.stack([class_row(p, t, CLASSES) for p, t in zip(predicted, known)])
    return {"parts": rows, "boundary": np.array([boundary(p, t) for p, t in zip(predicted, truth)])}


def summary(measured: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Mean IoU and boundary score with 95 % intervals, and their gain over another map of the same frames."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(measured["parts"]), len(measured["parts"])) for _ in range(RESAMPLES)]

    def both(one: dict[str, Any], chosen: Any) -> np.ndarray:
        return np.array([mean_iou(one["parts"][chosen]), one["boundary"][chosen].mean()])

    def interval(values: list[np.ndarray]) -> list[list[float]]:
        return np.quantile(np.stack(values), (0.025, 0.975), axis=0).T.tolist()

    point, spread = both(measured, slice(None)), interval([both(measured, d) for d in draws])
    gain = point - both(against, slice(None))
    wide = interval([both(measured, d) - both(against, d) for d in draws])
    facts = {name: [float(p), *s] for name, p, s in zip(("miou", "boundary"), point, spread)}
    return facts | {f"{name}_gain": [float(g), *s] for name, g, s in zip(("miou", "boundary"), gain, wide)}


def cost(source: dict[str, Any], head: Head, folder: Path, backend: str, threads: int, rounds: int) -> dict[str, Any]:
    """What a head adds to the FP32 student at each size: median milliseconds, and the share of the backbone's time."""
    facts: dict[str, Any] = {}
    for size in COST_SIZES:
        plain = export(**source, output=folder / f"plain-{size}", image_size=size).folder
        places = {"backbone": plain}
        for name, (method, stride) in MAPS.items():
            made = attach(plain, {"": head}, folder / f"{size}-{name}", upsample=method, stride=stride, labels=True)
            places[name] = made.folder
        loaded = {name: FeatureExtractor.load(place, backend, threads=threads) for name, place in places.items()}
        height, width = Bundle.read(plain).manifest.sizes.default
        image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        times = np.zeros((rounds, len(loaded)))
        for i in range(-3, rounds):
            for place, extractor in enumerate(loaded.values()):
                began = time.perf_counter()
                extractor.run(image)
                times[i, place] = time.perf_counter() - began
        facts[size] = {"backbone_ms": float(1e3 * np.median(times[:, 0]))}
        for place, name in enumerate(list(loaded)[1:], 1):
            added = times[:, place] - times[:, 0]
            share = np.quantile(times[:, place] / times[:, 0] - 1, (0.25, 0.5, 0.75))
            facts[size][name] = {"added_ms": float(1e3 * np.median(added)), "share": share.tolist()}
        for extractor in loaded.values():
            extractor.close()
    return facts


@click.command()
@click.argument("name")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True)
@click.option("--student", required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--backend", default="onnxruntime-cpu")
@click.option("--threads", type=int, default=2)
@click.option("--rounds", type=int, default=60)
@click.option("--cost-only", is_flag=True, help="Measure the cost again, and put it into the JSON that is there.")
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
def main(
    name: str,
    checkpoint: Path,
    student: str,
    data: Path,
    backend: str,
    threads: int,
    rounds: int,
    cost_only: bool,
    output: Path,
) -> None:
    if cost_only:
        report = json.loads(output.read_text())
        with tempfile.TemporaryDirectory() as temporary:
            weight = np.random.default_rng(0).standard_normal((CLASSES, load_model(student).embed_dim))
            head = Head(weight.astype(np.float32), np.zeros(CLASSES, np.float32), classes=NAMES)
            report["cost"] = cost({"model": student}, head, Path(temporary), backend, threads, rounds)
        output.write_text(json.dumps(report, indent=1) + "\n")
        return
    images = {part: read(data / f"camvid_{part}") for part in ("train", "val")}
    truth = {part: read(data / f"camvid_{part}_labels") for part in ("train", "val")}
    sources: dict[str, dict[str, Any]] = {
        "base": {"model": name, "checkpoint": checkpoint},
        "student": {"model": student},
    }
    report = {"model": name, "processor": processor(), "backend": backend, "threads": threads}
    with tempfile.TemporaryDirectory() as temporary:
        folder, kept = Path(temporary), {}
        for label, source in sources.items():
            plain = export(**source, output=folder / label, image_size=f"{SIZE[0]}x{SIZE[1]}").folder
            patch = Bundle.read(plain).manifest.model.patch[0]
            labels = patch_labels(truth["train"], patch, CLASSES + 1)
            labels = labels.reshape(len(labels), SIZE[0] // patch, SIZE[1] // patch)
            kept[label] = plain, train(run(plain, images["train"], "features", backend, threads), labels)
        (plain, head) = kept["student"]
        calibrate(plain, data / "camvid_train", folder / "int8")
        kept["INT8 student"] = folder / "int8", head
        answers: dict[str, dict[str, np.ndarray]] = {}
        for label, (plain, head) in kept.items():
            answers[label] = {}
            for place, (method, stride) in MAPS.items():
                bundle = folder / f"{label}-{method}-{stride}"
                attach(plain, {"": head}, bundle, upsample=method, stride=stride, labels=True)
                maps = run(bundle, images["val"], "labels", backend, threads)
                answers[label][place] = maps.repeat(stride, 1).repeat(stride, 2)
            click.echo(f"{label}: answers on {len(images['val'])} frames")
        measured = {
            label: {place: figures(maps, truth["val"]) for place, maps in own.items()} for label, own in answers.items()
        }
        report["models"] = {
            label: {place: summary(values, measured["base"][place]) for place, values in own.items()}
            for label, own in measured.items()
        }
        # What following the image's colours gains at the same stride.
        report["finer"] = {
            label: summary(own["joint bilateral, stride 4"], own["bilinear, stride 4"])
            for label, own in measured.items()
        }
        changed = {place: float((answers["student"][place] != answers["INT8 student"][place]).mean()) for place in MAPS}
        report["changes"] = changed
        report["cost"] = cost(sources["student"], kept["student"][1], folder, backend, threads, rounds)
    output.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
