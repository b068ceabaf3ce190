"""Writes Q/DQ pairs around the linear layers of a graph, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from phreg_deploy.calibration.smoothing import Equalised
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.wiring import copy_without, replace_nodes
from phreg_deploy.quantisation import Grid, halves


def write_int8(
    model: ModelProto, linears: list[Linear], equalised: Equalised, keep: set[str], target: str, share: bool = False
) -> ModelProto:
    """A copy of ``model`` with equalised numbers, and int8 weights and activations wherever ``keep`` does not forbid it.

    "cpu": a zero point for hidden units, in uint8. "trt": TensorRT takes no zero point, so the same grid is reached by
    shifting the hidden units by a constant, which the bias takes back. Biases are ``[1, 1, O]`` and every MatMul has a
    DequantizeLinear of its own: with either otherwise, ONNX Runtime computes in float.

    Args:
        share: one Q/DQ for all layers that read an input, as TensorRT likes it.
    """
    copy = copy_without(model, {linear.weight for linear in linears})
    return _Writer(copy, equalised, target, share).write(linears, keep)


class _Writer:
    def __init__(self, model: ModelProto, equalised: Equalised, target: str, share: bool) -> None:
        self.model = model
        self.equalised, self.target, self.share = equalised, target, share
        self.given: dict[str, tuple[str, float]] = {}  # input -> what it became for the first of its readers
        self.nodes: list[NodeProto] = []
        self.made: set[str] = set()
        self.readers: dict[str, int] = {}

    def write(self, linears: list[Linear], keep: set[str]) -> ModelProto:
        graph = self.model.graph
        by_matmul = {linear.matmul: linear for linear in linears}
        adds = {linear.add for linear in linears if linear.add}
        for node in graph.node:
            if node.name in self.equalised.norms:
                scale, shift = self.equalised.norms[node.name]
                del node.input[1:]
                node.input.extend(
                    [
                        self.constant(f"{node.name}.scale", scale.astype(np.float32)),
                        self.constant(f"{node.name}.shift", shift.astype(np.float32)),
                    ]
                )
                self.nodes.append(node)
            elif node.name in by_matmul:
                self.linear(by_matmul[node.name], node, by_matmul[node.name].name in keep)
            elif node.name not in adds:
                self.nodes.append(node)
        replace_nodes(self.model, self.nodes)
        return self.model

    def linear(self, linear: Linear, node: NodeProto, keep: bool) -> None:
        name, bias = linear.name, self.equalised.biases[linear.name]
        ends = self._end(linear, node)
        if keep:
            operands = [node.input[0], self.constant(f"{name}.float", self.equalised.float_weights[name])]
        else:
            grid = self.equalised.grids[name]
            values, steps = self.equalised.eight_bits[name]
            steps = halves(steps) if self.target == "trt" else steps
            source, shift = self.activation(linear, node.input[0], grid)
            bias = bias - shift * (values.astype(np.float64) * steps).sum(axis=0)
            zero = self.constant(f"{name}.weight_zero", np.zeros(len(steps), np.int8))
            self.add(
                "DequantizeLinear",
                [self.constant(f"{name}.int8", values), self.constant(f"{name}.weight_step", steps), zero],
                f"{name}/weight",
                axis=1,
            )
            operands = [source, f"{name}/weight"]
        shape = (-1,) if keep else (1, 1, -1)
        if linear.add is None and not bias.any():
            self.nodes.append(helper.make_node("MatMul", operands, [ends], name=linear.matmul))
            return
        self.nodes.append(helper.make_node("MatMul", operands, [f"{name}/product"], name=linear.matmul))
        constant = self.constant(f"{name}.bias_folded", bias.astype(np.float32).reshape(shape))
        self.nodes.append(helper.make_node("Add", [f"{name}/product", constant], [ends], name=f"{name}/Add"))

    def activation(self, linear: Linear, source: str, grid: Grid) -> tuple[str, float]:
        """The dequantized input of one MatMul, and by how much it was shifted.

        Layers that share an input each have a QuantizeLinear of their own: ONNX Runtime takes signed inputs to its
        integer kernels only where one has a single reader. Their steps differ in the last place, or it would merge them.
        """
        if self.share and source in self.given:
            return self.given[source]
        shift, quantised = 0.0, f"{linear.name}/quantised"
        reader = self.readers[source] = self.readers.get(source, -1) + 1
        value = np.float32(grid.step)
        if self.target == "trt":  # what FP16 holds exactly, so that narrowing moves no grid
            value = np.float32(halves(grid.step))
        for _ in range(reader):
            value = np.nextafter(value, np.float32(np.inf))
        hidden, signed = linear.kind == "hidden", grid.symmetric or self.target == "trt"
        step = self.constant(f"{linear.name}.step", value)
        zero = self.constant(f"{source}.zero", np.int8(0) if signed else np.uint8(grid.zero))
        if hidden and signed and not grid.symmetric:
            shift = (grid.zero - 128) * float(value)
        scaled = source
        if hidden and (grid.smooth != 1).any():
            factor = self.constant(
                f"{linear.name}.smooth", (1 / grid.smooth.astype(np.float64)).astype(np.float32).reshape(1, 1, -1)
            )
            scaled = self.add("Mul", [scaled, factor], f"{linear.name}/smooth")
        if shift:
            scaled = self.add(
                "Add", [scaled, self.constant(f"{linear.name}.shift", np.float32(shift))], f"{linear.name}/shift"
            )
        self.add("QuantizeLinear", [scaled, step, zero], quantised)
        self.given[source] = self.add("DequantizeLinear", [quantised, step, zero], f"{linear.name}/input"), shift
        return self.given[source]

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        if name not in self.made:
            self.made.add(name)
            self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _end(self, linear: Linear, node: NodeProto) -> str:
        """The tensor that leaves the layer: after its bias where it has one."""
        if linear.add is None:
            return node.output[0]
        return next(n.output[0] for n in self.model.graph.node if n.name == linear.add)
