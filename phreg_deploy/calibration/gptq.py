"""Weights rounded so that the errors of one input channel are made good by the channels after it.

GPTQ (arXiv 2210.17323) on the grid of ``quantisation.quantise_weight``, with the second moments of the calibration
images' inputs and, on their diagonal, the noise that the inputs' own rounding adds. C input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.onnx_graph.linears import Linear, by_source
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.quantisation import WEIGHT_STEPS, Grid, quantise_weight

ROWS = 32768  # token rows that moments are taken over: ten per channel of a hidden layer of 3072
TOGETHER = 128 * 2**20  # bytes of moments per pass over the images; large models take several passes
DAMPING = 0.01  # of the mean second moment, as in the paper
BLOCK = 128


@dataclass
class Moments:
    """Sums over rows of one input: x x^T ``(C, C)``, x ``(C,)``, and the number of rows."""

    square: np.ndarray
    total: np.ndarray
    rows: int

    def centred(self, grid: Grid) -> np.ndarray:
        """Mean of x' x'^T on the grid's own axes, with the rounding noise of x' (step^2 / 12) on the diagonal."""
        mean, centre = self.total / self.rows, grid.centre.astype(np.float64)
        moments = self.square / self.rows - np.outer(centre, mean) - np.outer(mean, centre) + np.outer(centre, centre)
        smooth = grid.smooth.astype(np.float64)
        moments /= np.outer(smooth, smooth)
        moments[np.diag_indices_from(moments)] += grid.step**2 / 12
        return moments


def observe_moments(
    model: ModelProto, sources: dict[str, int], tokens: int, feeds: list[tuple[dict[str, np.ndarray], int]],
    advance: Callable[..., None], done: Callable[[str, Moments], None],
) -> None:  # fmt: skip
    """Second moments of inputs, handed to ``done`` source by source; at most ``TOGETHER`` bytes of them at a time.

    Args:
        sources: input tensor -> C. tokens: rows per image.
    """
    used = feeds[: max(1, -(-ROWS // (tokens * max(1, feeds[0][1]))))]
    waiting = list(sources)
    while waiting:
        now = [waiting.pop(0)]
        while waiting and 4 * sum(sources[s] ** 2 for s in (*now, waiting[0])) <= TOGETHER:
            now.append(waiting.pop(0))
        session = open_session(_instrumented(model, now, sources))
        wanted = [f"{kind}/{source}" for source in now for kind in ("square", "total")]
        found = {s: Moments(np.zeros((sources[s], sources[s]), np.float32), np.zeros(sources[s]), 0) for s in now}
        for feed, _ in used:
            values = dict(zip(wanted, session.run(wanted, feed)))
            for source in now:
                found[source].square += values[f"square/{source}"]
                found[source].total += values[f"total/{source}"]
                found[source].rows += tokens * len(feed["image"])
        del session
        for source in now:
            done(source, found.pop(source))
            advance(1)


def _instrumented(model: ModelProto, sources: list[str], widths: dict[str, int]) -> ModelProto:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "moments/axis"))
    for source in sources:
        flat = f"moments/{source}"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, widths[source]], np.int64), f"{flat}/shape"))
        graph.node.append(helper.make_node("Reshape", [source, f"{flat}/shape"], [flat]))
        graph.node.append(helper.make_node("Gemm", [flat, flat], [f"square/{source}"], transA=1))
        graph.node.append(helper.make_node("ReduceSum", [flat, "moments/axis"], [f"total/{source}"], keepdims=0))
        for kind in ("square", "total"):
            graph.output.append(helper.make_tensor_value_info(f"{kind}/{source}", TensorProto.FLOAT, None))
    return watched


@dataclass(frozen=True)
class Format:
    """A grid for weights: ``plain`` rounds ``(C, O)`` to 8-bit values and steps ``(O,)``, ``nearest`` rounds w / step to values."""

    plain: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    nearest: Callable[[np.ndarray], np.ndarray]


INT8 = Format(quantise_weight, lambda scaled: np.clip(np.round(scaled), -WEIGHT_STEPS, WEIGHT_STEPS))


def round_weight(weight: np.ndarray, moments: np.ndarray, form: Format = INT8) -> tuple[np.ndarray, np.ndarray]:
    """``(C, O)`` and the moments ``(C, C)`` of its input -> 8-bit values ``(C, O)`` and steps ``(O,)``.

    Falls back to plain rounding where the moments cannot be inverted.
    """
    plain, steps = form.plain(weight)
    size = len(moments)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(size)] += DAMPING * max(float(np.trace(moments)) / size, 1e-12)
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper, inverse = factor^T factor
    except np.linalg.LinAlgError:
        return plain, steps
    if not np.isfinite(factor).all():  # of NaN, numpy's factor is NaN and no error
        return plain, steps
    left, values = weight.astype(np.float64), np.empty_like(plain)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        errors = np.empty((end - start, weight.shape[1]))
        for row in range(start, end):
            values[row] = form.nearest(left[row] / steps)
            errors[row - start] = (left[row] - values[row].astype(np.float64) * steps) / factor[row, row]
            left[row:end] -= factor[row, row:end, None] * errors[row - start]
        left[end:] -= factor[start:end, end:].T @ errors
    return values, steps


def round_all(
    model: ModelProto,
    linears: list[Linear],
    equalised: Any,
    tokens: int,
    feeds: Any,
    advance: Callable[..., None],
    form: Format = INT8,
) -> None:
    """Replace the 8-bit weights of ``equalised`` by ones rounded on the calibration images."""
    groups = by_source(linears)
    sources = {source: equalised.weights[group[0].name].shape[0] for source, group in groups.items()}

    def done(source: str, moments: Moments) -> None:
        centred = moments.centred(equalised.grids[groups[source][0].name])
        for linear in groups[source]:
            equalised.eight_bits[linear.name] = round_weight(equalised.weights[linear.name], centred, form)

    observe_moments(model, sources, tokens, feeds, advance, done)
