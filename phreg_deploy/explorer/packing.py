"""Pack features as 8-bit integers over principal components, so that a page can compute their cosines.

K components, M images, (Hp, Wp) patch grid, C channels.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Components beyond this share of the variance are left out.
VARIANCE = 0.9999
LEVELS = 127
# The step grows by this factor until the codes fit the budget, at most to COARSEST: cosines are then off by about 0.04.
GROWTH, COARSEST = 1.25, 0.1
# Tokens of all models on which sizes are estimated.
TOKENS = 20_000
# Pairs of tokens on which the error of the cosines is measured.
PAIRS = 20_000


@dataclass(frozen=True)
class Packed:
    """Unit-length features of several models over one basis.

    ``codes``: by model, int8 ``(K, M, Hp, Wp)``. A token is ``codes * step + offset`` over the components, and ``rest``
    in one more dimension, the part of the mean that the components lack: the cosines of these K + 1 numbers are those
    of the features, but for rounding and the components that were left out. One step for all components has the least
    error for its size: weak components get few levels. ``origin``: by model, the model whose codes are stored with the
    difference to them, None for the model's own. ``kept``: share (0-1) of the variance of the unit-length features that
    the codes hold. ``error_p99``, ``error_max``: absolute, of the cosine of two tokens of one image and model.
    """

    codes: dict[str, np.ndarray]
    origin: dict[str, str | None]
    step: float
    offset: np.ndarray
    rest: float
    channels: int
    kept: float = 0.0
    error_p99: float = 0.0
    error_max: float = 0.0

    def vectors(self, model: str) -> np.ndarray:
        """Return the unpacked tokens of a model, unit length, float64 ``(M, Hp, Wp, K + 1)``, as on the page."""
        shown = self._components(model)
        shown = np.concatenate([shown, np.full((*shown.shape[:-1], 1), self.rest)], axis=-1)
        return shown / np.maximum(np.linalg.norm(shown, axis=-1, keepdims=True), 1e-12)  # type: ignore[no-any-return]

    def stored(self, model: str) -> np.ndarray:
        """Return what is stored of a model: its codes, or their difference to those of its origin, modulo 256."""
        origin = self.origin[model]
        return self.codes[model] if origin is None else self.codes[model] - self.codes[origin]

    def _components(self, model: str) -> np.ndarray:
        return np.moveaxis(self.codes[model] * self.step, 0, -1) + self.offset


def pack(features: Mapping[str, np.ndarray], reference: str, budget: int) -> Packed:
    """Pack features ``(M, Hp, Wp, C)`` by model.

    Args:
        reference: the model that others are nearly equal to, and may be stored as differences to.
        budget: bytes for all codes when they are deflated; coarser steps than ``COARSEST`` are not taken for it.
    """
    unit = {name: _unit(value) for name, value in features.items()}
    mean = np.mean([value.reshape(-1, value.shape[-1]).mean(0, dtype=np.float64) for value in unit.values()], axis=0)
    mean = mean.astype(np.float32)
    basis, total = _basis(list(unit.values()), mean)
    centred = {name: np.moveaxis((value - mean) @ basis, -1, 0) for name, value in unit.items()}
    step = _step(centred, reference, budget)
    codes = {name: np.rint(value / step).astype(np.int8) for name, value in centred.items()}
    used = max(1, *(int(np.flatnonzero(c.any((1, 2, 3))).max(initial=0)) + 1 for c in codes.values()))
    codes = {name: np.ascontiguousarray(value[:used]) for name, value in codes.items()}
    origin, _ = _origins(codes, reference)
    offset = basis[:, :used].T @ mean
    rest = float(np.linalg.norm(mean - basis[:, :used] @ offset))
    packed = Packed(codes, origin, step, offset, rest, len(mean))
    # Of the variance, the components hold their own less what rounding takes.
    held = sum(float((z[:used] ** 2).sum() - ((z[:used] - codes[m] * step) ** 2).sum()) for m, z in centred.items())
    errors = np.concatenate([_errors(value, packed.vectors(name)) for name, value in unit.items()])
    usual, worst = float(np.quantile(errors, 0.99)), float(errors.max())
    return replace(packed, kept=min(1.0, max(0.0, held / total)), error_p99=usual, error_max=worst)


def _basis(unit: list[np.ndarray], mean: np.ndarray) -> tuple[np.ndarray, float]:
    """Principal axes as columns ``(C, K)``, for all models, and the sum of squares of all centred tokens."""
    square = np.zeros((len(mean), len(mean)))
    for value in unit:
        tokens = value.reshape(-1, value.shape[-1]) - mean
        square += tokens.T @ tokens
    variances, vectors = np.linalg.eigh(square)
    variances = np.maximum(variances[::-1], 0)
    total = max(float(variances.sum()), 1e-24)
    count = min(int(np.searchsorted(np.cumsum(variances) / total, VARIANCE)) + 1, len(mean))
    return vectors[:, ::-1][:, :count].astype(np.float32), total


def _step(centred: dict[str, np.ndarray], reference: str, budget: int) -> float:
    """The finest step whose codes fit 8 bits and the budget; sizes are estimated on some of the tokens."""
    flat = {name: value.reshape(len(value), -1) for name, value in centred.items()}
    tokens = next(iter(flat.values())).shape[1]
    every = max(1, len(flat) * tokens // TOKENS)
    some = {name: np.ascontiguousarray(value[:, ::every]) for name, value in flat.items()}
    scale = tokens / next(iter(some.values())).shape[1]
    step = max(*(float(np.abs(value).max()) for value in centred.values()), 1e-9) / LEVELS
    while step * GROWTH <= COARSEST:
        codes = {name: np.rint(value / step).astype(np.int8) for name, value in some.items()}
        if scale * _origins(codes, reference)[1] <= budget:
            break
        step *= GROWTH
    return step


def array(values: np.ndarray) -> dict[str, Any]:
    """Write an array into JSON: type, shape, and base64 of its little-endian bytes, deflated (RFC 1950)."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "data": data}


def _origins(codes: dict[str, np.ndarray], reference: str) -> tuple[dict[str, str | None], float]:
    """Choose for each model whether its codes or the differences are smaller; return the bytes of all too."""
    origin: dict[str, str | None] = {}
    total = 0.0
    for name, own in codes.items():
        sizes: dict[str | None, float] = {None: _entropy(own)}
        if name != reference:
            sizes[reference] = _entropy(own - codes[reference])
        origin[name] = min(sizes, key=lambda key: sizes[key])
        total += sizes[origin[name]]
    return origin, total


def _entropy(codes: np.ndarray) -> float:
    """Bytes that a code with its own table for each component takes, which deflate comes near to."""
    size = 0.0
    for component in codes.reshape(len(codes), -1):
        counts = np.bincount(component.view(np.uint8), minlength=256)
        share = counts[counts > 0] / component.size
        size -= float((share * np.log2(share)).sum()) * component.size / 8
    return size


def _unit(features: np.ndarray) -> np.ndarray:
    # A broken bundle gets a page too.
    values = np.nan_to_num(features.astype(np.float32), posinf=0.0, neginf=0.0)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


def _errors(unit: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Absolute errors of the cosine on ``PAIRS`` pairs of tokens, each pair of one image."""
    flat, short = unit.reshape(len(unit), -1, unit.shape[-1]), packed.reshape(len(unit), -1, packed.shape[-1])
    rng = np.random.default_rng(0)
    image, a, b = (rng.integers(0, high, PAIRS) for high in (len(flat), flat.shape[1], flat.shape[1]))
    exact = np.einsum("pc,pc->p", flat[image, a], flat[image, b])
    return np.abs(np.einsum("pc,pc->p", short[image, a], short[image, b]) - exact)  # type: ignore[no-any-return]
