"""Score the artifacts of any source of dense features: a PyTorch model, a student or a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.artifacts.measures import NormOutliers, ShiftIncoherence, norm_outliers, shift_incoherence
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.images.views import draw_views, gather, seed_of, show
from phreg_deploy.progress import Progress
from phreg_deploy.spec import plain

# images uint8 (B, H, W, 3) -> features (B, Hp, Wp, C) after the final norm, pre-norm token norms (B, Hp, Wp)
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

VIEWS = 10
# Of the views that score; training draws its own.
SEED = 20505


@dataclass(frozen=True)
class Scores:
    """``norm_outliers`` at the pre-norm tap, ``shift_incoherence`` at the served tap, over so many ``images``.

    ``first_norms`` ``(Hp, Wp)`` and ``first_features`` ``(Hp, Wp, C)`` are those of the first image, for pictures.
    Without features, ``shift_incoherence`` and ``first_features`` are None.
    """

    norm_outliers: NormOutliers
    shift_incoherence: ShiftIncoherence | None
    images: int
    first_norms: np.ndarray
    first_features: np.ndarray | None

    def to_json(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in ("norm_outliers", "shift_incoherence", "images")}


def score(
    run: Run,
    photographs: Photographs,
    patch: tuple[int, int],
    *,
    median: float | None = None,
    progress: Progress,
    name: str = "scoring",
) -> Scores:
    """Score ``run`` on every photograph, relative to the base model's ``median`` pre-norm norm (None: its own)."""
    grid = (photographs.size[0] // patch[0], photographs.size[1] // patch[1])
    unshifted, others, covered, norms = [], [], [], []
    with progress.task(name, len(photographs)) as advance:
        for i, digest in enumerate(photographs.digests):
            views = draw_views(VIEWS, grid, seed_of(SEED, digest))
            image = photographs.array(i)
            features, token_norm = run(np.stack([show(image, view, patch) for view in views]))
            total, count = gather(np.asarray(features[1:], dtype=np.float32), views[1:])
            unshifted.append(np.asarray(features[0], dtype=np.float32))
            others.append(total)
            covered.append(count)
            norms.append(np.asarray(token_norm[0], dtype=np.float32))
            advance()
    centre = np.mean([features.mean((0, 1)) for features in unshifted], axis=0)
    incoherence = shift_incoherence(np.stack(unshifted), np.stack(others), np.stack(covered), centre)
    return Scores(norm_outliers(np.stack(norms), median), incoherence, len(photographs), norms[0], unshifted[0])


def score_norms(
    run: Callable[[np.ndarray], np.ndarray],
    photographs: Photographs,
    *,
    median: float | None = None,
    progress: Progress,
    name: str = "scoring",
) -> Scores:
    """Score token norms alone: ``run`` turns uint8 images ``(1, H, W, 3)`` into norms ``(1, Hp, Wp)``."""
    norms = []
    with progress.task(name, len(photographs)) as advance:
        for i in range(len(photographs)):
            norms.append(np.asarray(run(photographs.array(i)[None])[0], dtype=np.float32))
            advance()
    return Scores(norm_outliers(np.stack(norms), median), None, len(photographs), norms[0], None)
