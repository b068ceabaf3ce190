"""Round weights by GPTQ (arXiv 2210.17323): later input channels compensate the rounding errors of earlier ones.

The grid is that of ``quantisation.quantise_weight``. The second moments are those of the layer's inputs on the
calibration images, with the noise of the inputs' own rounding added to the diagonal.
C input channels, O output channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.calibration.images import Feeds
from phreg_deploy.calibration.smoothing import Equalised
from phreg_deploy.onnx_graph.external import Arrays
from phreg_deploy.onnx_graph.linears import Linear, by_source
from phreg_deploy.onnx_graph.parts import Walk, block_starts
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.progress import Advance
from phreg_deploy.quantisation import WEIGHT_STEPS, Grid, quantise_weight

# Token rows that moments are taken over: ten per channel of a hidden layer of 3072.
ROWS = 32768
# Share of the mean second moment that is added to the diagonal, as in the paper.
DAMPING = 0.01
BLOCK = 128


@dataclass
class Moments:
    """Sums over rows of one input: x x^T ``(C, C)``, x ``(C,)``, and the number of rows."""

    square: np.ndarray
    total: np.ndarray
    rows: int

    def centred(self, grid: Grid) -> np.ndarray:
        """Return the mean of x' x'^T on the grid's axes, plus the rounding noise step^2 / 12 on the diagonal."""
        mean, centre = self.total / self.rows, grid.centre.astype(np.float64)
        moments = self.square / self.rows - np.outer(centre, mean) - np.outer(mean, centre) + np.outer(centre, centre)
        smooth = grid.smooth.astype(np.float64)
        moments /= np.outer(smooth, smooth)
        moments[np.diag_indices_from(moments)] += grid.step**2 / 12
        return moments


def observe_moments(
    model: ModelProto,
    sources: dict[str, int],
    tokens: int,
    feeds: Feeds,
    advance: Advance,
    done: Callable[[str, Moments], None],
    arrays: Arrays | None = None,
) -> None:
    """Compute second moments of inputs and pass them to ``done``, input by input.

    The graph runs block by block, so that every image passes through it once, and only one block's moments and weights
    are in memory.

    Args:
        sources: input tensor -> C. tokens: rows per image. arrays: the constants that are not in the graph.
    """
    used = feeds[: max(1, -(-ROWS // (tokens * max(1, feeds[0][1]))))]
    walk = Walk(model, [feed for feed, _ in used], arrays)
    rows = tokens * sum(len(feed["image"]) for feed, _ in used)
    places = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    for end in (*block_starts(model)[1:], None):
        now = [s for s in sources if walk.at <= places[s] < (len(places) if end is None else end)]
        moments = {s: Moments(np.zeros((sources[s], sources[s]), np.float32), np.zeros(sources[s]), rows) for s in now}
        walk.step(end, functools.partial(_instrument, now, sources), functools.partial(_add, moments))
        for source in now:
            done(source, moments.pop(source))
            advance(1)


def _add(moments: dict[str, Moments], values: dict[str, np.ndarray]) -> None:
    for source, sums in moments.items():
        sums.square += values[f"square/{source}"]
        sums.total += values[f"total/{source}"]


def _instrument(sources: list[str], widths: dict[str, int], part: ModelProto) -> ModelProto:
    """Add the sums over rows of some inputs to a part of the graph, in place."""
    graph = part.graph
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "moments/axis"))
    for source in sources:
        flat = f"moments/{source}"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, widths[source]], np.int64), f"{flat}/shape"))
        graph.node.append(helper.make_node("Reshape", [source, f"{flat}/shape"], [flat]))
        graph.node.append(helper.make_node("Gemm", [flat, flat], [f"square/{source}"], transA=1))
        graph.node.append(helper.make_node("ReduceSum", [flat, "moments/axis"], [f"total/{source}"], keepdims=0))
        for kind in ("square", "total"):
            graph.output.append(helper.make_tensor_value_info(f"{kind}/{source}", TensorProto.FLOAT, None))
    return part


@dataclass(frozen=True)
class Format:
    """A grid for weights.

    ``plain`` rounds weights ``(C, O)`` to 8-bit values and steps ``(O,)``; ``nearest`` rounds w / step to values.
    """

    plain: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    nearest: Callable[[np.ndarray], np.ndarray]


INT8 = Format(quantise_weight, lambda scaled: np.clip(np.round(scaled), -WEIGHT_STEPS, WEIGHT_STEPS))


def round_weight(weight: np.ndarray, moments: np.ndarray, form: Format = INT8) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight ``(C, O)`` with the moments ``(C, C)`` of its input.

    Returns:
        8-bit values ``(C, O)`` and steps ``(O,)``; those of plain rounding if the moments cannot be inverted.
    """
    plain, steps = form.plain(weight)
    size = len(moments)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(size)] += DAMPING * max(float(np.trace(moments)) / size, 1e-12)
    try:
        # Upper triangular: inverse = factor^T factor.
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        return plain, steps
    # For a matrix with NaN, numpy returns a factor of NaN and raises nothing.
    if not np.isfinite(factor).all():
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
    wiring: Wiring,
    linears: list[Linear],
    equalised: Equalised,
    tokens: int,
    feeds: Feeds,
    advance: Advance,
    form: Format = INT8,
) -> None:
    """Round the 8-bit weights of ``equalised`` on the calibration images, in place."""
    groups = by_source(linears)
    sources = {source: wiring.constants[group[0].weight].dims[0] for source, group in groups.items()}

    def done(source: str, moments: Moments) -> None:
        centred = moments.centred(equalised.grids[groups[source][0].name])
        for linear in groups[source]:
            equalised.eight_bits[linear.name] = round_weight(equalised.weights[linear.name], centred, form)

    observe_moments(wiring.model, sources, tokens, feeds, advance, done, wiring.arrays)
