"""Exact folds that make a graph's linear layers fit for 8 bits: the same function, other numbers inside.

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
    """The numbers of an equalised graph: weights ``(C, O)`` and biases ``(O,)``, layer norms' scale and shift ``(C,)``, grids.

    ``float_weights`` are for layers that stay in float: the same, but for hidden units, which they read as they are.
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
        rule: places a grid; another one is for ablations.
    """
    weights = {linear.name: wiring.value(linear.weight).copy() for linear in linears}
    biases = {
        linear.name: np.zeros(weights[linear.name].shape[1])
        if linear.bias is None
        else wiring.value(linear.bias).astype(np.float64).reshape(-1)
        for linear in linears
    }
    found = Equalised(weights, biases, {}, {}, {}, {})
    nodes = {node.name: node for node in wiring.model.graph.node}
    for source, group in by_source(linears).items():
        kind = group[0].kind
        part = "others" if kind == "hidden" and not smoothing.registers else "all"
        grid = rule(ranges[source][part], kind, smoothing)
        for linear in group:
            found.grids[linear.name] = grid
            if kind == "hidden":
                found.float_weights[linear.name] = wiring.value(linear.weight)
            biases[linear.name] += grid.centre.astype(np.float64) @ weights[linear.name].astype(np.float64)
            weights[linear.name] *= grid.smooth[:, None]
        if kind == "norm":
            norm = nodes[group[0].feeder]
            shift = wiring.value(norm.input[2]) if len(norm.input) > 2 else np.zeros_like(grid.centre)
            found.norms[norm.name] = (wiring.value(norm.input[1]) / grid.smooth, (shift - grid.centre) / grid.smooth)
        elif kind == "value":
            feeder, (start, end) = group[0].feeder, group[0].columns
            weights[feeder][:, start:end] /= grid.smooth
            biases[feeder][start:end] = (biases[feeder][start:end] - grid.centre) / grid.smooth
    found.eight_bits = {name: quantise_weight(weight) for name, weight in weights.items()}
    found.float_weights = {**weights, **found.float_weights}
    return found
