"""Pack features as 8-bit integers over principal components, so that a page can compute their cosines.

K components, T tokens of C channels.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Components are kept until this share of the variance, or until the budget is spent.
VARIANCE = 0.999
LEAST = 16
LEVELS = 127
# Pairs of tokens on which the error of the cosines is measured.
PAIRS = 20_000


@dataclass(frozen=True)
class Packed:
    """Unit-length features of several models over one basis.

    ``codes``: by model, int8 of the features' shape with K in place of C. A token is ``codes * scale + offset`` over
    the components, and ``rest`` in one more dimension, the part of the mean that the components lack: these K + 1
    numbers have the cosines of the features, but for rounding and the components that were left out. ``kept``: share of
    the variance of the unit-length features, 0-1. ``error_p99``, ``error_max``: absolute, of the cosine of two tokens
    of one image and model.
    """

    codes: dict[str, np.ndarray]
    scale: np.ndarray
    offset: np.ndarray
    rest: float
    kept: float
    channels: int
    error_p99: float
    error_max: float

    def vectors(self, model: str) -> np.ndarray:
        """Return the unpacked tokens of a model, unit length, float64 ``(..., K + 1)``, as the page unpacks them."""
        codes = self.codes[model]
        shown = np.concatenate([codes * self.scale + self.offset, np.full((*codes.shape[:-1], 1), self.rest)], axis=-1)
        return shown / np.linalg.norm(shown, axis=-1, keepdims=True)


def pack(features: Mapping[str, np.ndarray], budget: int) -> Packed:
    """Pack features ``(M, Hp, Wp, C)`` by model.

    Args:
        budget: bytes for all codes; at least ``LEAST`` components are kept all the same.
    """
    unit = {name: _unit(value) for name, value in features.items()}
    tokens = np.concatenate([value.reshape(-1, value.shape[-1]) for value in unit.values()])
    mean = tokens.mean(0)
    variances, vectors = np.linalg.eigh(np.cov((tokens - mean).T))
    variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1]
    total = max(float(variances.sum()), 1e-24)
    wanted = int(np.searchsorted(np.cumsum(variances) / total, VARIANCE)) + 1
    count = min(wanted, max(LEAST, budget // len(tokens)), tokens.shape[1])
    basis = vectors[:, :count]
    centred = {name: (value - mean) @ basis for name, value in unit.items()}
    largest = np.max([np.abs(value).reshape(-1, count).max(0) for value in centred.values()], axis=0)
    scale = (np.maximum(largest, 1e-12) / LEVELS).astype(np.float32)
    codes = {name: np.rint(value / scale).astype(np.int8) for name, value in centred.items()}
    offset = basis.T @ mean
    rest = float(np.linalg.norm(mean - basis @ offset))
    kept = float(variances[:count].sum() / total)
    packed = Packed(codes, scale, offset.astype(np.float32), rest, kept, tokens.shape[1], 0.0, 0.0)
    errors = np.concatenate([_errors(value, packed.vectors(name)) for name, value in unit.items()])
    return Packed(**{**vars(packed), "error_p99": float(np.quantile(errors, 0.99)), "error_max": float(errors.max())})


def array(values: np.ndarray) -> dict[str, Any]:
    """Write an array into JSON: type, shape, and base64 of its little-endian bytes, deflated (RFC 1950)."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "data": data}


def _unit(features: np.ndarray) -> np.ndarray:
    # A broken bundle gets a page too.
    values = np.nan_to_num(features.astype(np.float64), posinf=0.0, neginf=0.0)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def _errors(unit: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Absolute errors of the cosine on ``PAIRS`` pairs of tokens, each pair of one image."""
    flat, short = unit.reshape(len(unit), -1, unit.shape[-1]), packed.reshape(len(unit), -1, packed.shape[-1])
    rng = np.random.default_rng(0)
    image, a, b = (rng.integers(0, high, PAIRS) for high in (len(flat), flat.shape[1], flat.shape[1]))
    exact = np.einsum("pc,pc->p", flat[image, a], flat[image, b])
    return np.abs(np.einsum("pc,pc->p", short[image, a], short[image, b]) - exact)  # type: ignore[no-any-return]
