"""Name the outputs of a bundle's graph that a head reads, and join them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from phreg_deploy.errors import PhregError


def input_names(layers: tuple[int, ...] | None) -> tuple[str, ...]:
    """Return ``features``, or ``features.L`` of each layer in its order."""
    return ("features",) if layers is None else tuple(f"features.{layer}" for layer in layers)


def join_layers(outputs: Mapping[str, np.ndarray], layers: tuple[int, ...] | None) -> np.ndarray:
    """Join the features of ``layers`` along C, out of outputs by name: ``(B, Hp, Wp, C)``.

    Raises:
        PhregError: an output is missing.
    """
    names = input_names(layers)
    missing = [name for name in names if name not in outputs]
    if missing:
        raise PhregError(f"head: it reads {missing[0]}, but there are only {', '.join(sorted(outputs))}.")
    parts = [outputs[name] for name in names]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
