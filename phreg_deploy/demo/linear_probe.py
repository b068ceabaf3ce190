"""A linear probe on dense features, in closed form: ridge regression onto the patch's class. M images, K classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGE = 1e-3  # of the mean variance of the features


@dataclass(frozen=True)
class Probe:
    """``weight`` ``(C + 1, K)``; the last row is the bias."""

    weight: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> Probe:
        """``features`` ``(..., C)`` and integer ``labels`` of the same leading shape."""
        x = features.reshape(-1, features.shape[-1]).astype(np.float64)
        mean, spread = x.mean(0), x.std(0) + 1e-6
        x = np.column_stack([(x - mean) / spread, np.ones(len(x))])
        y = np.eye(classes)[labels.reshape(-1)]
        gram = x.T @ x
        return cls(np.linalg.solve(gram + RIDGE * len(x) * np.eye(len(gram)), x.T @ y), mean, spread)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class per token, shape of ``features`` without its last axis."""
        x = (features.astype(np.float64) - self.mean) / self.spread
        return (x @ self.weight[:-1] + self.weight[-1]).argmax(-1)  # type: ignore[no-any-return]


def patch_labels(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """The commonest class of each patch: uint8 ``(M, H, W)`` -> ``(M, Hp, Wp)``."""
    m, height, width = labels.shape
    tiles = labels.reshape(m, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
    tiles = tiles.reshape(*tiles.shape[:3], -1)
    return np.stack([(tiles == k).sum(-1) for k in range(classes)], -1).argmax(-1)  # type: ignore[no-any-return]


def mean_iou(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean intersection over union over the classes that occur, 0-1."""
    scores = []
    for k in range(classes):
        union = ((predicted == k) | (labels == k)).sum()
        if (labels == k).any():
            scores.append(((predicted == k) & (labels == k)).sum() / union)
    return float(np.mean(scores))
