"""Train a linear head on frozen features of patches. P patches, C channels, K classes.

Features are standardised by the training patches' mean and deviation, as a batch norm without its own factor does at
inference, and this is folded into the head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from phreg_deploy.evaluation.adamw import IMAGES, STEPS, fit_adamw

# Of L-BFGS.
ITERATIONS, HISTORY, GRADIENT, DECREASE = 200, 20, 1e-4, 1e-6
# Below this deviation a channel says nothing.
LEAST_DEVIATION = 1e-6
# The score of a class that no training patch has, below every other one.
ABSENT = -1e4


@dataclass(frozen=True)
class Fit:
    """``weight`` float32 ``(K, C)`` and ``bias`` float32 ``(K,)`` for raw features; what the solver did."""

    weight: np.ndarray
    bias: np.ndarray
    iterations: int
    converged: bool


def fit_classes(
    x: np.ndarray, y: np.ndarray, classes: int, protocol: str, decay: float, patches: int = 1, seed: int = 0
) -> Fit:
    """Train on ``x`` float32 ``(P, C)``, which is overwritten, and classes ``y`` ``(P,)``.

    Args:
        protocol: "logistic": multinomial logistic regression, by L-BFGS of scipy, minimising the mean cross-entropy
            plus ``decay`` times the sum of squared weights. "ridge": scikit-learn's ``RidgeClassifier`` with
            ``alpha = decay * P``. "dinov2": see ``adamw``.
        patches: of one image, for the batches of "dinov2". seed: of its draws.
    """
    mean, deviation = _standardise(x)
    present, index = np.unique(y, return_inverse=True)
    if protocol == "ridge":
        from sklearn.linear_model import RidgeClassifier

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = RidgeClassifier(alpha=decay * len(x)).fit(x, index)
        coefficients, intercept = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
        # Of two classes it holds the second one's score, whose sign decides.
        if len(present) == 2:
            coefficients, intercept = np.vstack([-coefficients, coefficients]), np.hstack([-intercept, intercept])
        fitted = Fit(coefficients, intercept, 1, True)
    elif protocol == "dinov2":
        fitted = Fit(*fit_adamw(x, index, len(present), decay, IMAGES * patches, seed), STEPS, True)
    else:
        fitted = _logistic(x, index, len(present), decay)
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, ABSENT)
    weight[present], bias[present] = fitted.weight, fitted.bias
    return _folded(weight, bias, mean, deviation, fitted)


def fit_depth(x: np.ndarray, y: np.ndarray, decay: float) -> Fit:
    """Train scikit-learn's ``Ridge`` with ``alpha = decay * P`` on log depth ``y`` ``(P,)``; ``x`` as above."""
    from sklearn.linear_model import Ridge

    mean, deviation = _standardise(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Ridge(alpha=decay * len(x)).fit(x, y.astype(np.float32))
    fitted = Fit(np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), 1, True)
    return _folded(fitted.weight.astype(np.float64), fitted.bias.astype(np.float64), mean, deviation, fitted)


def _standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(0, dtype=np.float64)
    x -= mean.astype(np.float32)
    deviation = np.maximum(np.sqrt(np.einsum("pc,pc->c", x, x, dtype=np.float64) / len(x)), LEAST_DEVIATION)
    x /= deviation.astype(np.float32)
    return mean, deviation


def _folded(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, deviation: np.ndarray, fitted: Fit) -> Fit:
    raw = weight / deviation
    return Fit(raw.astype(np.float32), (bias - raw @ mean).astype(np.float32), fitted.iterations, fitted.converged)


def _logistic(z: np.ndarray, y: np.ndarray, classes: int, decay: float) -> Fit:
    from scipy.optimize import minimize

    count, width = z.shape
    rows = np.arange(count)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = flat.reshape(width + 1, classes)
        scores = z @ weight[:-1].astype(np.float32)
        scores += weight[-1].astype(np.float32)
        scores -= scores.max(1, keepdims=True)
        chosen = scores[rows, y].sum(dtype=np.float64)
        np.exp(scores, out=scores)
        total = scores.sum(1, keepdims=True)
        value = (np.log(total).sum(dtype=np.float64) - chosen) / count
        scores /= total
        scores[rows, y] -= 1
        gradient = np.vstack([z.T @ scores, scores.sum(0)]).astype(np.float64) / count
        gradient[:-1] += 2 * decay * weight[:-1]
        return value + decay * float((weight[:-1] ** 2).sum()), gradient.reshape(-1)

    options = {"maxiter": ITERATIONS, "maxcor": HISTORY, "gtol": GRADIENT, "ftol": DECREASE}
    found = minimize(loss, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    weight = found.x.reshape(width + 1, classes).T
    return Fit(weight[:, :-1], weight[:, -1], int(found.nit), bool(found.success))
