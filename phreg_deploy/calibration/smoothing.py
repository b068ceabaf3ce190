"""Centre and smooth the inputs of a graph's linear layers by exact folds: the function of the graph stays the same.

C input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from phreg_deploy.calibration.ranges import Ranges
from phreg_deploy.onnx_graph.linears import Linear, by_source
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Grid, Range, Smoothing, make_grid, quantise_weight

Rule = Callable[[Range, str, Smoothing], Grid]


@dataclass(frozen=True)
class Weights(Mapping[str, np.ndarray]):
    """The equalised weight ``(C, O)`` of each layer, computed when it is read: a large model's do not fit twice.

    ``smooth``: factors ``(C,)`` of a layer's rows. ``divided``: columns of a layer, and their divisors.
    """

    wiring: Wiring
    linears: dict[str, Linear]
    smooth: dict[str, np.ndarray]
    divided: dict[str, tuple[slice, np.ndarray]]

    def __getitem__(self, name: str) -> np.ndarray:
        weight = self.wiring.value(self.linears[name].weight) * self.smooth[name][:, None]
        if name in self.divided:
            columns, divisors = self.divided[name]
            weight[:, columns] /= divisors
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


@dataclass
class Equalised:
    """The constants of an equalised graph, by layer.

    ``weights`` ``(C, O)`` and ``biases`` ``(O,)``; ``norms``: scale and shift ``(C,)`` of each layer norm; ``grids`` of
    the inputs; ``eight_bits``: values ``(C, O)`` and steps ``(O,)``.
    """

    weights: Weights
    biases: dict[str, np.ndarray]
    norms: dict[str, tuple[np.ndarray, np.ndarray]]
    grids: dict[str, Grid]
    eight_bits: dict[str, tuple[np.ndarray, np.ndarray]]

    def float_weight(self, name: str) -> np.ndarray:
        """The weight ``(C, O)`` of a layer that stays in float.

        That of a layer that reads hidden units is not smoothed, because the graph does not scale hidden units for it.
        """
        linear = self.weights.linears[name]
        return self.weights.wiring.value(linear.weight) if linear.kind == "hidden" else self.weights[name]


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
    weights = Weights(wiring, {linear.name: linear for linear in linears}, {}, {})
    biases = {
        linear.name: np.zeros(wiring.constants[linear.weight].dims[1])
        if linear.bias is None
        else wiring.value(linear.bias).astype(np.float64).reshape(-1)
        for linear in linears
    }
    equalised = Equalised(weights, biases, {}, {}, {})
    nodes = {node.name: node for node in wiring.model.graph.node}
    for source, group in by_source(linears).items():
        kind = group[0].kind
        part = "others" if kind == "hidden" and not smoothing.registers else "all"
        grid = rule(ranges[source][part], kind, smoothing)
        for linear in group:
            equalised.grids[linear.name] = grid
            biases[linear.name] += grid.centre.astype(np.float64) @ wiring.value(linear.weight).astype(np.float64)
            weights.smooth[linear.name] = grid.smooth
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
            weights.divided[feeder] = slice(start, end), grid.smooth
            biases[feeder][start:end] = (biases[feeder][start:end] - grid.centre) / grid.smooth
    equalised.eight_bits = {name: quantise_weight(weight) for name, weight in weights.items()}
    return equalised
