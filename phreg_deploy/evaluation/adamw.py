"""Train a linear layer by AdamW as DINOv2's linear evaluation does (arXiv 2304.07193). P patches, K classes.

The settings are those of the configurations that DINOv2 published for MMSegmentation: AdamW with a rate of 1e-3 and
betas of .9 and .999, 40,000 steps of 16 images, a linear warm-up of 1,500 steps, and a rate that falls to 0 linearly.
"""

from __future__ import annotations

import numpy as np

STEPS, IMAGES, WARM_UP = 40_000, 16, 1500
RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
# The rate of the first step, in rates.
FIRST = 1e-6


def fit_adamw(
    z: np.ndarray, y: np.ndarray, classes: int, decay: float, batch: int, seed: int, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the mean cross-entropy over patches.

    Args:
        z: standardised features, float32 ``(P, C)``, C channels. y: classes ``(P,)``. decay: weight decay.
        batch: patches of a step, drawn without replacement until all were drawn. seed: of the draws and the weights.

    Returns:
        Weight float64 ``(K, C)`` and bias ``(K,)``.
    """
    rng = np.random.default_rng(seed)
    batch = min(batch, len(z))
    # MMSegmentation begins its layer with weights of a normal distribution with deviation .01.
    values = rng.normal(0, 0.01, (z.shape[1] + 1, classes)).astype(np.float32)
    values[-1] = 0
    mean, square = np.zeros_like(values), np.zeros_like(values)
    order, at = rng.permutation(len(z)), 0
    gradient = np.empty_like(values)
    for step in range(steps):
        if at + batch > len(z):
            order, at = rng.permutation(len(z)), 0
        chosen = order[at : at + batch]
        at += batch
        x, truth = z[chosen], y[chosen]
        scores = x @ values[:-1] + values[-1]
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        scores[np.arange(batch), truth] -= 1
        scores /= batch
        gradient[:-1], gradient[-1] = x.T @ scores, scores.sum(0)
        rate = rate_at(step, steps)
        values *= 1 - rate * decay
        mean += (1 - BETAS[0]) * (gradient - mean)
        square += (1 - BETAS[1]) * (gradient**2 - square)
        unbiased = np.sqrt(square / (1 - BETAS[1] ** (step + 1))) + EPS
        values -= rate / (1 - BETAS[0] ** (step + 1)) * mean / unbiased
    return values[:-1].T.astype(np.float64), values[-1].astype(np.float64)


def rate_at(step: int, steps: int) -> float:
    """The rate of a step: MMCV's polynomial schedule of power 1, under its linear warm-up."""
    falling = RATE * (1 - step / steps)
    warm = min(WARM_UP, steps // 2)
    return falling if step >= warm else falling * (1 - (1 - step / warm) * (1 - FIRST))
