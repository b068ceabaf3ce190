"""Centre and smooth the inputs of a graph's linear layers by exact folds: the function of the graph stays the same.

C input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phreg_deploy.calibration.ranges import Ranges
from phreg_deploy.onnx_graph.linears import Linear, by_source
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Grid, Range, Smoothing, make_grid, quantise_weight

Rule = Callable[[Range, str, Smoothing], Grid]


@dataclass
class Equalised:
    """The constants of an equalised graph, by layer.

    ``weights`` ``(C, O)`` and ``biases`` ``(O,)``; ``norms``: scale and shift ``(C,)`` of each layer norm; ``grids`` of
    the inputs; ``eight_bits``: values ``(C, O)`` and steps ``(O,)``. ``float_weights``: for layers that stay in float;
    those of layers that read hidden units are not smoothed, because the graph does not scale hidden units for them.
    """

    weights: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    norms: dict[str, tuple[np.ndarray, np.ndarray]]
    grids: dict[str, Grid]
    eight_bits: dict[str, tuple[np.ndarray, np.ndarray]]
    float_weights: dict[str, np.ndarray]


def equalise(
    wiring: Wiring, linears: list[Linear], ranges: Ranges, smoothing: Smoothing, rule: Rule = make_grid
) -> Equalised:
    """Centre and smooth every layer's input.

    Centre and scale go into the layer norm before (RepQ-ViT, arXiv 2212.08254; Outlier Suppression+, arXiv
    2304.09145), and for attention outputs into the value rows of the projection before, which is exact because rows of
    a softmax sum to 1. Hidden units keep their scale as one multiplication in the graph.

    Args:
        rule: makes a grid of a range; ablations use other rules.
    """
    weights = {linear.name: wiring.value(linear.weight).copy() for linear in linears}
    biases = {
        linear.name: np.zeros(weights[linear.name].shape[1])
        if linear.bias is None
        else wiring.value(linear.bias).astype(np.float64).reshape(-1)
        for linear in linears
    }
    equalised = Equalised(weights, biases, {}, {}, {}, {})
    nodes = {node.name: node for node in wiring.model.graph.node}
    for source, group in by_source(linears).items():
        kind = group[0].kind
        part = "others" if kind == "hidden" and not smoothing.registers else "all"
        grid = rule(ranges[source][part], kind, smoothing)
        for linear in group:
            equalised.grids[linear.name] = grid
            if kind == "hidden":
                equalised.float_weights[linear.name] = wiring.value(linear.weight)
            biases[linear.name] += grid.centre.astype(np.float64) @ weights[linear.name].astype(np.float64)
            weights[linear.name] *= grid.smooth[:, None]
        if kind == "norm":
            norm = nodes[group[0].feeder]
            # An RMS norm, which ends in a Mul, has no shift.
            shift = wiring.value(norm.input[2]) if len(norm.input) > 2 else np.zeros_like(grid.centre)
            equalised.norms[norm.name] = (
                wiring.value(norm.input[1]) / grid.smooth,
                (shift - grid.centre) / grid.smooth,
            )
        elif kind == "value":
            feeder, (start, end) = group[0].feeder, group[0].columns
            weights[feeder][:, start:end] /= grid.smooth
            biases[feeder][start:end] = (biases[feeder][start:end] - grid.centre) / grid.smooth
    equalised.eight_bits = {name: quantise_weight(weight) for name, weight in weights.items()}
    equalised.float_weights = {**weights, **equalised.float_weights}
    return equalised
