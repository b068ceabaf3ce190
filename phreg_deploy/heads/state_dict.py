"""Find the linear layer of a head in a state dict, and fold the normalisation before it into weight and bias.

K outputs, C channels of the features. A linear layer is a weight ``(K, C)`` or a 1x1 convolution ``(K, C, 1, 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from phreg_deploy.errors import PhregError

# PyTorch's default; a state dict does not hold it.
EPS = 1e-5
STATISTICS = ("running_mean", "running_var")
Parts = tuple[np.ndarray, np.ndarray]


def linear_of(tensors: Mapping[str, np.ndarray], name: str, prefix: str = "", eps: float = EPS) -> Parts:
    """Return ``weight`` float32 ``(K, C)`` and ``bias`` float32 ``(K,)`` that compute the whole head.

    A batch norm over C channels (``running_mean`` and ``running_var``) or ``mean`` and ``std`` ``(C,)`` are folded in,
    in float64.

    Args:
        name: of the file, for messages. prefix: read only the tensors whose names begin with it.
        eps: of the batch norm.

    Raises:
        PhregError: no linear layer, several, another layer as well, or shapes that do not fit.
    """
    chosen = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    matrices = [key for key, value in chosen.items() if _is_linear(value)]
    if len(matrices) != 1:
        found = f"{len(matrices)} ({', '.join(sorted(matrices)[:4])})" if matrices else "none"
        hint = " Name one of them by its prefix." if len(matrices) > 1 else ""
        raise PhregError(
            f"head: {name} should hold one weight (K, C) or (K, C, 1, 1), but it holds {found}; expected one linear "
            f"layer or 1x1 convolution.{hint}"
        )
    (key,) = matrices
    weight = chosen.pop(key).astype(np.float64)
    weight = weight.reshape(len(weight), -1)
    bias_key = key.removesuffix("weight") + "bias"
    bias = chosen.pop(bias_key).astype(np.float64) if bias_key in chosen else np.zeros(len(weight))
    if bias.shape != (len(weight),):
        raise PhregError(f"head: {bias_key} in {name} has the shape {bias.shape}, expected ({len(weight)},).")
    scale, shift = _normalisation(chosen, name, weight.shape[1], eps)
    others = sorted(k for k, v in chosen.items() if not k.endswith("num_batches_tracked"))
    if others:
        raise PhregError(
            f"head: {name} holds {others[0]} as well; expected a linear layer with at most one batch norm before it."
        )
    folded, offset = weight * scale, bias + weight @ shift
    return folded.astype(np.float32), offset.astype(np.float32)


def _is_linear(value: np.ndarray) -> bool:
    return value.ndim == 2 or (value.ndim == 4 and value.shape[2:] == (1, 1))


def _normalisation(tensors: dict[str, np.ndarray], name: str, width: int, eps: float) -> Parts:
    """Take the normalisation out of ``tensors``; return its factor and summand ``(C,)``, float64."""
    prefixes = [key.removesuffix(STATISTICS[0]) for key in tensors if key.endswith(STATISTICS[0])]
    if {"mean", "std"} <= set(tensors):
        mean, std = (_vector(tensors, key, name, width) for key in ("mean", "std"))
        if (std <= 0).any():
            raise PhregError(f"head: std in {name} should be above 0 everywhere.")
        return 1 / std, -mean / std
    if not prefixes:
        return np.ones(width), np.zeros(width)
    if len(prefixes) > 1:
        raise PhregError(f"head: {name} holds {len(prefixes)} batch norms; expected at most one, before the layer.")
    mean, variance = (_vector(tensors, prefixes[0] + key, name, width) for key in STATISTICS)
    gain = _vector(tensors, f"{prefixes[0]}weight", name, width, 1.0)
    shift = _vector(tensors, f"{prefixes[0]}bias", name, width, 0.0)
    if (variance < 0).any():
        raise PhregError(f"head: running_var in {name} should not be below 0.")
    scale = gain / np.sqrt(variance + eps)
    return scale, shift - mean * scale


def _vector(
    tensors: dict[str, np.ndarray], key: str, name: str, width: int, default: float | None = None
) -> np.ndarray:
    if key not in tensors and default is not None:
        return np.full(width, default)
    value = tensors.pop(key, None)
    if value is None or value.shape != (width,):
        got = "nothing" if value is None else f"the shape {value.shape}"
        raise PhregError(f"head: {name} has {got} as {key}, expected ({width},), one number per channel.")
    return value.astype(np.float64)
