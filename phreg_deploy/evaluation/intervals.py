"""Bootstrap intervals over images, or groups of them, and over the seeds of training; and comparisons with a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phreg_deploy.evaluation.scores import LOWER, Parts
from phreg_deploy.spec import Stored

RESAMPLES, LEVEL = 2000, 0.95
# With fewer groups to test on, images are resampled: a handful of groups gives no interval.
LEAST_GROUPS = 10
BETTER, WORSE, OPEN = "better", "worse", "not told apart"


@dataclass(frozen=True)
class Comparison(Stored):
    """``gain``: difference to the base, positive where it is better; ``interval``: of 95 %; ``verdict``."""

    figure: str
    gain: float
    interval: tuple[float, float]
    verdict: str


class Bootstrap:
    """The same resamples for every model, so that comparisons are paired.

    A resample draws as many groups of images as there are, with replacement, and one seed of training for every model.
    """

    def __init__(self, groups: Sequence[str], seed: int) -> None:
        names, index = np.unique(groups, return_inverse=True)
        self.unit = "groups" if len(names) >= LEAST_GROUPS else "images"
        if self.unit == "images":
            index = np.arange(len(groups))
        self.units = int(index.max()) + 1
        self.rng = np.random.default_rng(seed)
        draws = self.rng.multinomial(self.units, np.full(self.units, 1 / self.units), RESAMPLES)
        # (R, M): how often each image counts.
        self.weights = draws[:, index].astype(np.float64)

    def draw(self, parts: list[Parts]) -> dict[str, np.ndarray]:
        """Every figure in every resample, ``(R,)``, each with one seed's training."""
        chosen = self.rng.integers(0, len(parts), RESAMPLES)
        every = [p.figures(self.weights) for p in parts]
        rows = np.arange(RESAMPLES)
        return {name: np.stack([figures[name] for figures in every])[chosen, rows] for name in every[0]}


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The central 95 % of resampled values; None where nothing was counted."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def compare(figure: str, difference: float, drawn: np.ndarray) -> Comparison:
    """Compare a model with the base: better or worse if the interval of the difference excludes 0.

    Args:
        difference: of the figure, the model's less the base's. drawn: the same in every resample, ``(R,)``.
    """
    sign = -1.0 if figure in LOWER else 1.0
    low, high = interval(sign * drawn) or (0.0, 0.0)
    verdict = BETTER if low > 0 else WORSE if high < 0 else OPEN
    return Comparison(figure, sign * difference, (low, high), verdict)
