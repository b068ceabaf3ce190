"""``DenseFeatures``: the result of a ``FeatureExtractor``. B batch, (Hp, Wp) patch grid, C width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR


@dataclass(frozen=True)
class DenseFeatures:
    """Features of a batch of images.

    ``features`` float32 ``(B, Hp, Wp, C)`` after the final norm, registers dropped; ``cls`` float32 ``(B, C)`` or None;
    ``token_norm`` float32 ``(B, Hp, Wp)``: L2 norms of the last block's output before the final norm.
    ``norm_median``: the base model's median norm, where the bundle holds it.
    """

    features: np.ndarray
    cls: np.ndarray | None
    token_norm: np.ndarray
    norm_median: float | None = None

    @property
    def artifact_rate(self) -> np.ndarray:
        """Share (0-1) of high-norm or low-norm patch tokens per image, ``(B,)``; needs no extra forward pass.

        Norms are compared with ``norm_median``, or with each image's own median where the bundle has none.
        """
        flat = self.token_norm.reshape(len(self.token_norm), -1)
        median = np.median(flat, axis=1, keepdims=True) if self.norm_median is None else self.norm_median
        return ((flat > OUTLIER_FACTOR * median) | (flat < median / OUTLIER_FACTOR)).mean(axis=1)  # type: ignore[no-any-return]
