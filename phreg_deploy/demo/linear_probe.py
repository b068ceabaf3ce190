"""Fit a linear probe to dense features in closed form: ridge regression to the patch's class. M images, K classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# In units of the mean variance of the features.
RIDGE = 1e-3


@dataclass(frozen=True)
class LinearProbe:
    """``weight`` ``(C + 1, K)``; the last row is the bias."""

    weight: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> LinearProbe:
        """Fit a probe to ``features`` ``(..., C)`` and integer ``labels`` ``(...)``."""
        x = features.reshape(-1, features.shape[-1]).astype(np.float64)
        mean, spread = x.mean(0), x.std(0) + 1e-6
        x = np.column_stack([(x - mean) / spread, np.ones(len(x))])
        y = np.eye(classes)[labels.reshape(-1)]
        gram = x.T @ x
        return cls(np.linalg.solve(gram + RIDGE * len(x) * np.eye(len(gram)), x.T @ y), mean, spread)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predict the class ``(...)`` of each token of ``features`` ``(..., C)``."""
        x = (features.astype(np.float64) - self.mean) / self.spread
        return (x @ self.weight[:-1] + self.weight[-1]).argmax(-1)  # type: ignore[no-any-return]


def patch_labels(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """Return the most frequent class of each patch, ``(M, Hp, Wp)``, of uint8 ``labels`` ``(M, H, W)``."""
    m, height, width = labels.shape
    tiles = labels.reshape(m, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
    tiles = tiles.reshape(*tiles.shape[:3], -1)
    return np.stack([(tiles == k).sum(-1) for k in range(classes)], -1).argmax(-1)  # type: ignore[no-any-return]


def mean_iou(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Return the mean intersection over union, 0-1, of the classes that occur in ``labels``."""
    scores = []
    for k in range(classes):
        union = ((predicted == k) | (labels == k)).sum()
        if (labels == k).any():
            scores.append(((predicted == k) & (labels == k)).sum() / union)
    return float(np.mean(scores))
