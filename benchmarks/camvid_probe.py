"""Linear probe on CamVid: what a segmentation head reads out of dense features, on all patches and on the outliers.

    python benchmarks/camvid_probe.py --data FOLDER --base NAME --checkpoint FILE --student NAME=FOLDER ... [--int8 SHARE] --json OUT

FOLDER holds ``camvid_train``, ``camvid_val`` and their ``_labels``. Images and labels are cut to 480 x 352 (the lowest 8
rows go), so that 16 px patches fit. A patch's label is its commonest class; patches that are mostly void are left out.
The probe is multinomial logistic regression on standardised features, full-batch L-BFGS, one run a model. With ``--int8``
the probe of every model, trained on FP32 features, also reads the features of an INT8 bundle that was calibrated on
``camvid_train`` with at most SHARE of its MACs in float.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from phreg_deploy.artifacts import norm_outliers, outlier_mask
from phreg_deploy.calibration.calibrator import CalibrationRequest, calibrate
from phreg_deploy.demo.probe import patch_labels
from phreg_deploy.distill import taps
from phreg_deploy.distill.source import load_model, model_preprocess
from phreg_deploy.export.exporter import ExportRequest, export_bundle
from phreg_deploy.runtime.features import FeatureExtractor

Probe = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
SIZE, CLASSES, VOID = (352, 480), 11, 11
DECAY = 1e-4


def read(folder: Path) -> np.ndarray:
    """Images of a folder, uint8 ``(M, H, W, 3)``, or labels ``(M, H, W)``."""
    return np.stack([np.asarray(Image.open(path))[: SIZE[0], : SIZE[1]] for path in sorted(folder.iterdir())])


@torch.inference_mode()
def features(model: torch.nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    preprocess = model_preprocess(model)
    seen = [
        taps.forward(model, taps.normalise(images[i : i + 8], preprocess.mean, preprocess.std))
        for i in range(0, len(images), 8)
    ]
    return torch.cat([s.patches for s in seen]).numpy(), torch.cat([s.norms for s in seen]).numpy()


def eight_bit_features(
    model: str, checkpoint: Path | None, data: Path, share: float, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        full, eight = Path(scratch, "fp32.bundle"), Path(scratch, "int8.bundle")
        size = f"{SIZE[0]}x{SIZE[1]}"
        export_bundle(ExportRequest(model=model, checkpoint=checkpoint, image_size=size), full)
        calibrate(CalibrationRequest(full, data / "camvid_train", float_macs=share), eight, force=True)
        with FeatureExtractor.load(eight, "onnxruntime-cpu") as extractor:
            seen = [extractor.dense(image[None]) for image in images]
    features = np.concatenate([s.features for s in seen])
    return features.reshape(len(images), -1, features.shape[-1]), np.concatenate(
        [s.token_norm.reshape(1, -1) for s in seen]
    )


def fit(x: np.ndarray, y: np.ndarray) -> Probe:
    """Logistic regression; returns mean, spread, weight, bias."""
    mean, spread = torch.from_numpy(x.mean(0)), torch.from_numpy(x.std(0) + 1e-6)
    z, t = (torch.from_numpy(x) - mean) / spread, torch.from_numpy(y)
    weight, bias = torch.zeros(x.shape[1], CLASSES, requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight + bias, t) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return mean, spread, weight.detach(), bias.detach()


def scores(predicted: np.ndarray, labels: np.ndarray, outliers: np.ndarray) -> dict[str, float]:
    known = labels != VOID
    iou = []
    for k in range(CLASSES):
        union = ((predicted == k) | (labels == k)) & known
        if ((labels == k) & known).any():
            iou.append(((predicted == k) & (labels == k) & known).sum() / union.sum())
    right = predicted == labels
    return {
        "accuracy": float(right[known].mean()),
        "accuracy_outliers": float(right[known & outliers].mean()),
        "miou": float(np.mean(iou)),
    }


def nearest_interior(x: np.ndarray, outliers: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The trivial fix: each outlier token is replaced by the nearest token of its image that is none."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    fixed = x.copy()
    for m in range(len(x)):
        good = np.flatnonzero(~outliers[m])
        for i in np.flatnonzero(outliers[m]):
            fixed[m, i] = x[m, good[((rows[good] - rows[i]) ** 2 + (columns[good] - columns[i]) ** 2).argmin()]]
    return fixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--int8", type=float, metavar="SHARE")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)

    sets = {
        name: (read(asked.data / f"camvid_{name}"), read(asked.data / f"camvid_{name}_labels"))
        for name in ("train", "val")
    }
    base = load_model(asked.base, checkpoint=asked.checkpoint, image_size=SIZE)
    grid, patch = tuple(base.patch_embed.grid_size), base.patch_embed.patch_size[0]
    labels = {name: patch_labels(y, patch, CLASSES + 1).reshape(len(y), -1) for name, (_, y) in sets.items()}
    found = {name: features(base, x) for name, (x, _) in sets.items()}
    median = float(np.median(found["val"][1]))
    outliers = {name: outlier_mask(norms, median) for name, (_, norms) in found.items()}

    def probe(name: str, train: np.ndarray, val: np.ndarray, norms: np.ndarray) -> Probe:
        keep = labels["train"] != VOID
        trained = fit(train[keep], labels["train"][keep])
        rows.append(read_out(name, trained, val, norms))
        return trained

    def read_out(name: str, trained: Probe, val: np.ndarray, norms: np.ndarray) -> dict[str, object]:
        mean, spread, weight, bias = trained
        predicted = (((torch.from_numpy(val) - mean) / spread) @ weight + bias).argmax(-1).numpy()
        row = {
            "model": name,
            **scores(predicted, labels["val"], outliers["val"]),
            "norm_outlier_rate": norm_outliers(norms, median).rate,
        }
        print(json.dumps(row), flush=True)  # noqa: T201
        return row

    def also_int8(name: str, trained: Probe, model: str, checkpoint: Path | None) -> None:
        if asked.int8 is not None:
            eight = eight_bit_features(model, checkpoint, asked.data, asked.int8, sets["val"][0])
            rows.append(read_out(f"{name}, INT8", trained, *eight))

    rows: list[dict[str, object]] = []
    also_int8("base", probe("base", found["train"][0], *found["val"]), asked.base, asked.checkpoint)
    fixed = {name: nearest_interior(x, outliers[name], grid) for name, (x, _) in found.items()}
    probe("base, nearest interior patch copied", fixed["train"], fixed["val"], found["val"][1])
    for entry in asked.student:
        name, folder = entry.split("=", 1)
        seen = {s: features(load_model(folder, image_size=SIZE), x) for s, (x, _) in sets.items()}
        also_int8(name, probe(name, seen["train"][0], *seen["val"]), folder, None)
    report = {"size": SIZE, "outlier_tokens": int(outliers["val"].sum()), "rows": rows, "torch": torch.__version__}
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
