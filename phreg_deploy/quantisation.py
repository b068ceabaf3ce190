"""Compute in 8 bits, for ``calibrate`` and INT8-aware distillation alike.

A linear layer y = x W + b takes x' = (x - c) / s on a grid of 8 bits, and W' = diag(s) W in 8 bits per output channel:
y = x' W' + (b + c W). ``c`` and ``s`` are per input channel; they cost run time only for hidden units (``Smoothing``).
C input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

# The least magnitude of a channel: a dead channel would cause a division by zero.
LEAST = 1e-5
WEIGHT_STEPS = 127
# Room above the largest observed value of layer norms and values. On a ViT-Tiny with ranges of 64 images, one other
# image in a hundred was clipped at block 0, and it alone was the 1st percentile (1 - .038; with slack 1 - .022, with
# 256 images 1 - .016). Hidden units gain nothing by it and get none.
SLACK = 1.1
# The least reach of a hidden unit, as a share of the median channel's: on other images it may fire more than in
# calibration. Calibrated on photographs and evaluated on street scenes, all layers in 8 bits: 1 - cosine .0048 -> .0045
# on a ViT-Tiny, .0066 -> .0056 on a DeiT-Tiny (0, .25, .5 and 1 were tried with three exponents).
HEADROOM = 0.5


@dataclass(frozen=True)
class Smoothing(Stored):
    """How much of each channel's range moves from the activations into the weights.

    An exponent per kind of input, s = max|x - c|^alpha, or None for s = 1 (SmoothQuant, arXiv 2211.10438, without its
    division by the weights' ranges, which cost 6 % of 1 - cosine on a ViT-Tiny). ``norm``: outputs of a layer norm; s
    and c are folded into it. ``value``: attention outputs; both are folded into the value rows of the projection
    before. ``hidden``: activated hidden units; nothing can be folded through GELU, so the graph multiplies elementwise,
    and OpenVINO fuses the multiplication. ``registers``: include the register rows in the ranges of hidden units.
    """

    norm: float | None = 0.8
    value: float | None = 0.8
    hidden: float | None = 0.8
    registers: bool = True

    def __post_init__(self) -> None:
        for name in ("norm", "value", "hidden"):
            alpha = getattr(self, name)
            if alpha is not None and not 0 <= alpha <= 1:
                raise PhregError(f"smoothing: got {name} {alpha}, expected a number from 0 to 1, or none.")


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of each input channel over images and rows, float32 ``(C,)``."""

    low: np.ndarray
    high: np.ndarray

    def join(self, other: Range) -> Range:
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


@dataclass(frozen=True)
class Grid:
    """The grid of an input: x' = (x - centre) / smooth is rounded to ``step`` * (k - zero) for k = 0..255.

    ``centre`` and ``smooth`` are ``(C,)``. A ``zero`` of 128 is a symmetric grid: signed 8 bits with the zero point 0;
    -128 is never used.
    """

    centre: np.ndarray
    smooth: np.ndarray
    step: float
    zero: int

    @property
    def symmetric(self) -> bool:
        return self.zero == 128


def make_grid(observed: Range, kind: str, smoothing: Smoothing) -> Grid:
    """Make the grid of one input.

    Inputs from a layer norm or an attention are centred per channel, and a symmetric grid fits them. Hidden units are
    not centred: most are near 0, so 0 must stay a grid point, and their grid has a zero point.

    Args:
        kind: "norm", "value" or "hidden".
    """
    low, high = observed.low.astype(np.float64), observed.high.astype(np.float64)
    alpha = {"norm": smoothing.norm, "value": smoothing.value, "hidden": smoothing.hidden}[kind]
    centred = kind == "norm" or (kind == "value" and alpha is not None)
    centre = (low + high) / 2 if centred else np.zeros_like(low)
    smooth = np.ones_like(low)
    if alpha is not None:
        reach = np.maximum(np.abs(high - centre), np.abs(low - centre))
        floor = HEADROOM * float(np.median(reach)) if kind == "hidden" else 0.0
        smooth = np.maximum(np.maximum(reach, floor), LEAST) ** alpha
        smooth /= np.exp(np.log(smooth).mean())
    bottom = float(min(0.0, ((low - centre) / smooth).min()))
    top = float(max(0.0, ((high - centre) / smooth).max()))
    if kind == "hidden":
        step = np.float32(max(top - bottom, LEAST) / 255)
        zero = int(np.clip(np.round(-bottom / step), 0, 255))
    else:
        step, zero = np.float32(SLACK * max(top, -bottom, LEAST) / WEIGHT_STEPS), 128
    return Grid(centre.astype(np.float32), smooth.astype(np.float32), float(step), zero)


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight ``(C, O)`` to int8 ``(C, O)`` in -127..127 and float32 steps ``(O,)``, one per output channel."""
    steps = np.maximum(np.abs(weight).max(axis=0) / WEIGHT_STEPS, 1e-12).astype(np.float32)
    return np.clip(np.round(weight / steps), -WEIGHT_STEPS, WEIGHT_STEPS).astype(np.int8), steps


def halves(steps: np.ndarray | float) -> np.ndarray:
    """Round steps up to numbers that FP16 holds, as float32; a larger step never clips."""
    value = np.asarray(steps, np.float32)
    low = value.astype(np.float16)
    return np.where(low.astype(np.float32) < value, np.nextafter(low, np.float16(np.inf)), low).astype(np.float32)
