"""Measure by how much each patch of two answers differs, for each kind of gate. B images, (Hp, Wp) patch grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from phreg_deploy.artifacts.measures import cosine, outlier_mask
from phreg_deploy.layers import ATTENTION, DEPTH, HEADS, NORM, SEGMENTATION, kind_of

# Gate -> the kind of error that it is about; the class token has no patches.
KINDS = {
    "bad_values": "bad",
    "cosine_p1": "cosine",
    "cosine_min": "cosine",
    "neighbours": "cosine",
    "relative_l2": "distance",
    "norm_bias": "norm",
    "norm_difference": "norm",
    "outlier_points": "outlier",
    "head_change": "head",
    "cls_cosine": "cls",
}
# How people read each kind.
MEASURES = {
    "bad": "values that are NaN or infinite",
    "cosine": "1 - cosine",
    "distance": "relative distance",
    "norm": "relative difference of the norm",
    "outlier": "change into or out of a norm outlier",
    "head": "share of places with another answer",
    "cls": "1 - cosine of the class token",
}
# Gates about the worst patch; the others are about all patches of an image.
WORST_PATCH = ("bad_values", "cosine_min", "norm_difference")
# Stands for the error of a patch that is not finite.
LARGEST = 1e9

Outputs = Mapping[str, np.ndarray]
# Kind -> errors ``(B, Hp, Wp)``; "cls" has ``(B, 1, 1)``.
Errors = dict[str, np.ndarray]


def patch_errors(got: Outputs, expected: Outputs, median: float | None) -> dict[str, Errors]:
    """Compare a bundle's outputs with those of a reference.

    Args:
        got, expected: outputs by name, of the same shapes. median: to which norms are compared; None for each batch's.

    Returns:
        Errors float64 by layer, as ``ParityAccumulator.parts`` names them: "" for the last, "6", "attention".
    """
    layers = [name.partition(".")[2] for name in expected if kind_of(name) == NORM]
    errors = {}
    for layer in layers:
        names = {kind: f"{kind}.{layer}" if layer else kind for kind in ("features", "token_norm", "cls")}
        errors[layer] = _layer(names, got, expected, None if layer else median)
    if ATTENTION in expected:
        a, b = (outputs[ATTENTION].astype(np.float64) for outputs in (got, expected))
        bad, distance = (~np.isfinite(a)).sum(1), _filled(np.abs(a - b).max(1))
        errors[ATTENTION] = dict.fromkeys(("cosine", "distance", "norm"), distance) | {"bad": bad}
    changes = [_head(kind_of(name), got[name], expected[name]) for name in expected if kind_of(name) in HEADS]
    if changes:
        grid = expected[NORM].shape[1:3]
        errors[""]["head"] = np.max([_pooled(change, grid) for change in changes], axis=0)
        answers = [got[name] for name in expected if kind_of(name) in HEADS]
        bad = [_pooled(1 - np.isfinite(a).reshape(*a.shape[:3], -1).min(-1), grid) for a in answers]
        errors[""]["bad"] = errors[""]["bad"] + np.sum(bad, axis=0)
    return errors


def _layer(names: Mapping[str, str], got: Outputs, expected: Outputs, median: float | None) -> Errors:
    norms, wanted = (outputs[names["token_norm"]].astype(np.float64) for outputs in (got, expected))
    centre = float(np.median(wanted)) if median is None else median
    with np.errstate(invalid="ignore", over="ignore"):
        errors = {
            "bad": (~np.isfinite(norms)).astype(np.int64),
            "norm": np.abs(norms / np.maximum(wanted, 1e-12) - 1),
            "outlier": outlier_mask(norms, centre) != outlier_mask(wanted, centre),
        }
        # Where only heads are served there are none.
        if names["features"] in expected:
            a, b = (outputs[names["features"]].astype(np.float64) for outputs in (got, expected))
            errors["bad"] += (~np.isfinite(a)).sum(-1)
            errors["cosine"] = 1 - cosine(a, b)
            errors["distance"] = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-12)
        if names["cls"] in expected:
            errors["cls"] = (1 - cosine(got[names["cls"]], expected[names["cls"]]))[:, None, None]
    return {kind: _filled(value) for kind, value in errors.items()}


def _head(kind: str, got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return where the class differs, or by which share the depth does, ``(B, H, W)``."""
    if kind == DEPTH:
        wanted = expected.astype(np.float64)
        return _filled(np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-12))
    if kind == SEGMENTATION:
        got, expected = got.argmax(-1), expected.argmax(-1)
    return (got != expected).astype(np.float64)


def _pooled(values: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Return the mean over the places of each patch, ``(B, Hp, Wp)``."""
    shape = (len(values), grid[0], values.shape[1] // grid[0], grid[1], values.shape[2] // grid[1])
    return values.astype(np.float64).reshape(shape).mean((2, 4))


def _filled(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=LARGEST, posinf=LARGEST)
