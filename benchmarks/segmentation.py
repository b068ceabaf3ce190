"""Fit a linear probe on CamVid, with bootstrap intervals: what a segmentation head reads out of dense features.

Images and labels are cut to 480 x 352 px (without the lowest 8 rows) to fit 16 px patches. The label of a patch is its
commonest class; patches that are mostly void are left out. The probe is multinomial logistic regression on
standardised features: full-batch L-BFGS, weight decay 1e-4, trained on ``camvid_train`` and read on ``camvid_val``,
each model on its own features. ``camvid_val`` is one drive of seven seconds, so the intervals do not cover other
drives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from phreg_deploy.demo.linear_probe import patch_labels

SIZE, CLASSES, VOID = (352, 480), 11, 11
DECAY, RESAMPLES = 1e-4, 2000


class CamVid:
    """Images uint8 ``(M, H, W, 3)`` and patch labels ``(M, N)`` of train and val."""

    def __init__(self, data: Path, patch: int) -> None:
        self.images, self.labels = {}, {}
        for name in ("train", "val"):
            self.images[name] = _read(data / f"camvid_{name}")
            pixels = _read(data / f"camvid_{name}_labels")
            self.labels[name] = patch_labels(pixels, patch, CLASSES + 1).reshape(len(pixels), -1)

    def probe(self, train: np.ndarray, val: np.ndarray) -> np.ndarray:
        """Classes of val's patches ``(M, N)`` by a probe of the features ``(M, N, C)`` of train."""
        known = self.labels["train"] != VOID
        mean, spread, weight, bias = _fit(train[known], self.labels["train"][known])
        with torch.inference_mode():
            return (((torch.from_numpy(val) - mean) / spread) @ weight + bias).argmax(-1).numpy()

    def read(self, predicted: np.ndarray, outliers: np.ndarray) -> dict[str, Any]:
        """Accuracy of all patches and of the base model's outlier tokens, and the parts of mean IoU by frame."""
        labels = self.labels["val"]
        known, right = labels != VOID, predicted == labels
        parts = [
            [(m & (p == k) & (t == k)).sum(), (m & ((p == k) | (t == k))).sum(), (m & (t == k)).sum()]
            for p, t, m in zip(predicted, labels, known)
            for k in range(CLASSES)
        ]
        return {
            "accuracy": float(right[known].mean()),
            "accuracy_outliers": float(right[known & outliers].mean()) if (known & outliers).any() else None,
            "parts": np.array(parts, float).reshape(len(labels), CLASSES, 3),
        }


def mean_iou(parts: np.ndarray) -> float:
    """Mean IoU over the classes that occur, of frames ``(M, CLASSES, 3)``: intersection, union, occurrence."""
    intersection, union, occurs = parts.sum(0).T
    return float((intersection / np.maximum(union, 1))[occurs > 0].mean())


def intervals(seeds: list[np.ndarray], base: np.ndarray) -> dict[str, Any]:
    """Mean IoU over seeds and its gain over the base, each with a 95 % interval over resampled frames."""
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(base), len(base))
        value = float(np.mean([mean_iou(parts[chosen]) for parts in seeds]))
        resampled.append((value, value - mean_iou(base[chosen])))
    low, high = np.quantile(np.array(resampled), (0.025, 0.975), axis=0)
    value = float(np.mean([mean_iou(parts) for parts in seeds]))
    verdict = "better" if low[1] > 0 else "worse" if high[1] < 0 else "not told apart"
    return {
        "miou": value,
        "miou_interval": [float(low[0]), float(high[0])],
        "miou_seeds": [mean_iou(parts) for parts in seeds],
        "gain": value - mean_iou(base),
        "gain_interval": [float(low[1]), float(high[1])],
        "against_base": verdict,
    }


def nearest_interior(x: np.ndarray, outliers: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The trivial fix: replace each outlier token by the nearest ordinary token of its image."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    fixed = x.copy()
    for m in range(len(x)):
        good = np.flatnonzero(~outliers[m])
        for i in np.flatnonzero(outliers[m]):
            fixed[m, i] = x[m, good[((rows[good] - rows[i]) ** 2 + (columns[good] - columns[i]) ** 2).argmin()]]
    return fixed


def _read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path))[: SIZE[0], : SIZE[1]] for path in sorted(folder.iterdir())])


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
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
