"""``demo``: distil, export, check and serve the embedded model on generated scenes, and show what changed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.artifacts.measures import agreement, outlier_mask
from phreg_deploy.calibration import calibrate
from phreg_deploy.demo.scenes import CLASSES, make_scene, write_scenes
from phreg_deploy.demo.segmentation_probe import Probe, mean_iou, patch_labels
from phreg_deploy.distill.distillation import Request, distill
from phreg_deploy.distill.evaluation import REFERENCE_SEED, REFERENCE_VIEWS
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.errors import GateFailed
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.models.answers import block_norms, read_features
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.verify.checking import CheckRequest, check_extractor
from phreg_deploy.verify.html import render

MODEL = Path(__file__).parent / "model"
TRAINING, PROBED, TESTED = range(0, 288), range(1000, 1160), range(2000, 2064)  # seeds: no scene is in two of them
SHOWN = 4
EPOCHS = 8


def run_demo(output: Path, *, force: bool = False, progress: Progress = SILENT) -> dict[str, Any]:
    """Run everything into ``output``: ``student/``, ``demo.bundle/``, ``demo-int8.bundle/``, ``scenes/``, ``before-after.png``, ``report.html``.

    Returns:
        ``table``: rows of (figure, base, student, served by ONNX Runtime, the same in INT8) on scenes that nothing was trained on;
        ``figures``: the same by name; ``check``: the report of the parity check; ``seconds``.

    Raises:
        GateFailed: the bundle does not agree with the PyTorch student.
    """
    started = time.perf_counter()
    with atomic_folder(output, force) as folder:
        scenes, probed, tested = folder / "scenes", folder / "scenes-probe", folder / "scenes-test"
        progress.say("The model is small and its register neuron was planted; see phreg_deploy/demo/model/README.md.")
        for place, seeds in ((scenes, TRAINING), (probed, PROBED), (tested, TESTED)):
            place.mkdir()
            write_scenes(place, seeds)
        record = distill(
            Request(str(MODEL), scenes, epochs=EPOCHS),
            folder / "student",
            cache=folder / "cache",
            progress=progress,
        )
        export_bundle(ExportRequest(str(folder / "student"), batch="1:8:16"), folder / "demo.bundle", progress=progress)
        eight_bits = folder / "demo-int8.bundle"
        calibrate(folder / "demo.bundle", scenes, eight_bits, smoothing=Smoothing(), progress=progress)
        with (
            FeatureExtractor.load(folder / "demo.bundle", "onnxruntime-cpu") as extractor,
            FeatureExtractor.load(folder / "demo-int8.bundle", "onnxruntime-cpu") as eight,
        ):
            request = CheckRequest(str(folder / "student"), base=str(MODEL), images=tested, limit=16)
            check = check_extractor(extractor, request, progress)
            figures, pages = _measure(extractor, eight, folder, probed, tested)
        # The student's folder still has a temporary name here.
        *exam, student = check.comparisons
        comparisons = (*exam, replace(student, reference="PyTorch student"))
        check = replace(check, bundle="demo.bundle", comparisons=comparisons, pictures=pages)
        picture = sheet(pages, side=192)
        picture.save(folder / "before-after.png")
        (folder / "report.html").write_text(render(check))
        shutil.rmtree(folder / "cache")
        (folder / "demo.json").write_text(json.dumps({"figures": figures, "check": check.to_json()}, indent=1) + "\n")
    if check.missed:
        raise GateFailed(f"demo: {'; '.join(check.missed)}.")
    return {
        "output": str(output),
        "scenes": len(TESTED),
        "classes": list(CLASSES),
        "figures": figures,
        "table": _table(figures),
        "check": check.to_json(),
        "register_neurons": record["register_neurons"],
        "seconds": time.perf_counter() - started,
    }


def _measure(
    extractor: FeatureExtractor, eight: FeatureExtractor, folder: Path, probed: Path, tested: Path
) -> tuple[dict[str, dict[str, float | None]], list[list[tuple[str, Image.Image]]]]:
    """Figures of base, student and both served bundles on the test scenes, and the pictures of the first few."""
    base, student = load_model(str(MODEL)), load_model(str(folder / "student"))
    preprocess = model_preprocess(base)
    size = tuple(base.patch_embed.img_size)
    fitting, testing = (read_photographs(place, size, preprocess) for place in (probed, tested))
    labels = {
        name: patch_labels(np.stack([make_scene(s, size[0])[1] for s in seeds]), extractor.spec.patch[0], len(CLASSES))
        for name, seeds in (("fit", PROBED), ("test", TESTED))
    }
    labels = {name: value.reshape(len(value), -1) for name, value in labels.items()}
    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED)
    target = np.stack([t.patches for t in teacher.targets(testing)])
    target = target.reshape(len(target), -1, target.shape[-1])
    seen = {
        "base": (read_features(base, fitting, preprocess), read_features(base, testing, preprocess)),
        "student": (read_features(student, fitting, preprocess), read_features(student, testing, preprocess)),
    }
    seen["served"] = (_served(extractor, fitting), _served(extractor, testing))
    seen["int8"] = (_served(eight, fitting), _served(eight, testing))
    median = float(np.median(seen["base"][1]["norms"]))
    outliers = outlier_mask(seen["base"][1]["norms"], median)
    figures: dict[str, dict[str, float | None]] = {}
    for name, (fit, test) in seen.items():
        probe = Probe.fit(fit["patches"], labels["fit"], len(CLASSES))
        predicted = probe.predict(test["patches"])
        right = predicted == labels["test"]
        fidelity = agreement(test["patches"], target, outliers)
        model = {"base": base, "student": student}.get(name)
        blocks = None if model is None else block_norms(model, testing, preprocess)
        figures[name] = {
            "norm_outlier_rate": float(outlier_mask(test["norms"], median).mean()),
            "largest_norm": float(test["norms"].max() / median),
            "worst_block": None if blocks is None else max(b["largest"] for b in blocks),
            "fidelity": fidelity.mean,
            "fidelity_outliers": fidelity.chosen,
            "probe_accuracy": float(right.mean()),
            "probe_accuracy_outliers": float(right[outliers].mean()),
            "probe_miou": mean_iou(predicted, labels["test"], len(CLASSES)),
        }
    return figures, _pages(testing, {name: test for name, (_, test) in seen.items()}, extractor, median)


def _served(extractor: FeatureExtractor, photographs: Photographs) -> dict[str, np.ndarray]:
    dense = extractor.dense(photographs.batch(0, len(photographs)))
    return {
        "patches": dense.features.reshape(len(photographs), -1, dense.features.shape[-1]),
        "norms": dense.token_norm.reshape(len(photographs), -1),
    }


def _pages(
    photographs: Photographs, seen: dict[str, dict[str, np.ndarray]], extractor: FeatureExtractor, median: float
) -> list[list[tuple[str, Image.Image]]]:
    """One row a scene: image, features and norms before, features and norms as they are served after."""
    grid = tuple(s // p for s, p in zip(photographs.size, extractor.spec.patch))
    basis = components(list(seen["served"]["patches"][:SHOWN]))  # one for both: equal features, equal colours
    rows = []
    for i in range(SHOWN):
        row = [("scene", Image.fromarray(photographs.array(i)))]
        for name, word in (("base", "before"), ("served", "after")):
            features = seen[name]["patches"][i].reshape(*grid, -1)
            norms = seen[name]["norms"][i].reshape(grid)
            row += [(f"features {word}", colours(features, basis)), (f"norms {word}", heat(norms, 3 * median))]
        rows.append(row)
    return rows


def _table(figures: dict[str, dict[str, float | None]]) -> list[list[str]]:
    names = {
        "norm_outlier_rate": ("norm-outlier rate", "{:.3%}"),
        "largest_norm": ("largest norm / median", "{:.2f}"),
        "worst_block": ("largest norm / median in the worst block", "{:.2f}"),
        "fidelity": ("cosine to the denoised target, mean", "{:.4f}"),
        "fidelity_outliers": ("    over the base's outlier tokens", "{:.4f}"),
        "probe_accuracy": ("segmentation probe, patch accuracy", "{:.1%}"),
        "probe_accuracy_outliers": ("    over the base's outlier tokens", "{:.1%}"),
        "probe_miou": ("segmentation probe, mean IoU", "{:.1%}"),
    }
    return [
        [
            text,
            *(
                "-" if figures[m][key] is None else form.format(figures[m][key])
                for m in ("base", "student", "served", "int8")
            ),
        ]
        for key, (text, form) in names.items()
    ]
