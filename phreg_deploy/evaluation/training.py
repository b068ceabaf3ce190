"""Train a head on a draw of patches of the training images."""

from __future__ import annotations

from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.splits import Split
from phreg_deploy.evaluation.data.store import FeatureStore
from phreg_deploy.evaluation.data.truth import Depths, Masks, Truth
from phreg_deploy.evaluation.request import EvaluationRequest
from phreg_deploy.evaluation.solvers import Fit, fit_classes, fit_depth
from phreg_deploy.heads.head import Head

# Share of the patches that each seed draws.
DRAWN = 0.8


def targets_of(store: FeatureStore, truth: Truth, split: Split) -> dict[str, np.ndarray]:
    """What the patches of each training image are trained on, ``(Hp, Wp)`` each; see ``on_patches`` of the truth."""
    source = store.source
    return {name: truth.on_patches(name, source.size, source.grid, source.preprocess) for name in split.train}


def train(
    store: FeatureStore,
    truth: Truth,
    targets: dict[str, np.ndarray],
    split: Split,
    request: EvaluationRequest,
    seed: int,
) -> tuple[Head, Fit]:
    """Train a head on ``DRAWN`` of the patches with a truth, at most ``request.patches``, drawn by ``seed``.

    Raises:
        PhregError: patches of one class alone, or of no truth.
    """
    flat = np.concatenate([values.reshape(-1) for values in targets.values()])
    places = np.flatnonzero(flat >= 0 if isinstance(truth, Masks) else ~np.isnan(flat))
    y_all = np.unique(flat[places]) if isinstance(truth, Masks) else places
    if len(y_all) < 2:
        raise PhregError("evaluate: the training patches hold fewer than two values, expected more; split otherwise.")
    count = min(request.patches, max(2, int(DRAWN * len(places))))
    chosen = np.zeros(len(flat), bool)
    chosen[np.random.default_rng(seed).choice(places, count, replace=False)] = True
    x, y = _features(store, targets, chosen, count), flat[chosen]
    facts: dict[str, Any] = {"task": truth.task, "layers": store.source.layers}
    if isinstance(truth, Depths):
        fit = fit_depth(x, y, request.decay)
        low, high = float(np.exp(y.min())), float(np.exp(y.max()))
        facts["depth_range"] = (low, high) if low < high else None
    else:
        fit = fit_classes(
            x, y, len(truth.classes), request.solver, request.decay, int(np.prod(store.source.grid)), seed
        )
        facts |= {"classes": truth.classes, "colours": truth.colours, "ignore": request.ignore}
    source = store.source
    trained = {
        "model": source.name,
        "kind": source.kind,
        "digest": source.digest,
        "size": list(source.size),
        "images": len(split.train),
        "patches": count,
        "split": split.how,
        "protocol": request.solver,
        "decay": request.decay,
        "seed": seed,
        "iterations": fit.iterations,
        "converged": fit.converged,
    }
    return Head(fit.weight, fit.bias, trained_on=trained, **facts), fit


def _features(store: FeatureStore, targets: dict[str, np.ndarray], chosen: np.ndarray, count: int) -> np.ndarray:
    """Gather the features of the ``chosen`` patches, float32 ``(count, C)``."""
    gathered, start, filled = np.empty((0, 0), np.float32), 0, 0
    for name, values in targets.items():
        rows = np.flatnonzero(chosen[start : start + values.size])
        start += values.size
        if not len(rows):
            continue
        features = store.read(name)["features"]
        flat = features.reshape(-1, features.shape[-1])
        if not filled:
            gathered = np.empty((count, flat.shape[1]), np.float32)
        gathered[filled : filled + len(rows)] = flat[rows]
        filled += len(rows)
    return gathered
