"""Write INT8 Q/DQ pairs around the linear layers of a graph, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from phreg_deploy.calibration.smoothing import Equalised
from phreg_deploy.onnx_graph.external import LEAST, absent
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.wiring import copy_without, replace_nodes
from phreg_deploy.quantisation import Grid, halves


def write_int8(
    model: ModelProto,
    linears: list[Linear],
    equalised: Equalised,
    keep: set[str],
    target: str,
    share: bool = False,
    apart: dict[str, np.ndarray] | None = None,
) -> ModelProto:
    """Copy ``model`` with equalised constants, and with int8 weights and activations.

    With target "cpu", hidden units are in uint8 with a zero point. TensorRT takes none, so with "trt" a constant is
    added to the hidden units and the bias subtracts its effect. Biases are ``[1, 1, O]`` and every MatMul has a
    DequantizeLinear of its own; if one of the two is missing, ONNX Runtime computes in float.

    Args:
        keep: layers that stay in float.
        share: write one Q/DQ for all layers that read an input, for TensorRT.
        apart: receives the large constants that are written, which are then not in the graph; by default they are.
    """
    copy = copy_without(model, {linear.weight for linear in linears})
    return _Writer(copy, equalised, target, share, apart).write(linears, keep)


class _Writer:
    def __init__(
        self, model: ModelProto, equalised: Equalised, target: str, share: bool, apart: dict[str, np.ndarray] | None
    ) -> None:
        self.model, self.apart = model, apart
        self.equalised, self.target, self.share = equalised, target, share
        # Input -> its dequantised tensor and its shift, for the first of its readers.
        self.dequantised: dict[str, tuple[str, float]] = {}
        self.nodes: list[NodeProto] = []
        self.made: set[str] = set()
        self.readers: dict[str, int] = {}

    def write(self, linears: list[Linear], keep: set[str]) -> ModelProto:
        graph = self.model.graph
        by_matmul = {linear.matmul: linear for linear in linears}
        adds = {linear.add for linear in linears if linear.add}
        for node in graph.node:
            if node.name in self.equalised.norms:
                self.norm(node, *self.equalised.norms[node.name])
            elif node.name in by_matmul:
                self.linear(by_matmul[node.name], node, by_matmul[node.name].name in keep)
            elif node.name not in adds:
                self.nodes.append(node)
        replace_nodes(self.model, self.nodes)
        return self.model

    def norm(self, node: NodeProto, scale: np.ndarray, shift: np.ndarray) -> None:
        """Write a norm with another scale and shift; an RMS norm gets an Add for the shift."""
        scales, shifts = (
            self.constant(f"{node.name}.{name}", value.astype(np.float32))
            for name, value in (("scale", scale), ("shift", shift))
        )
        del node.input[1:]
        node.input.append(scales)
        self.nodes.append(node)
        if node.op_type == "LayerNormalization":
            node.input.append(shifts)
            return
        output, node.output[0] = node.output[0], f"{node.name}/scaled"
        self.nodes.append(helper.make_node("Add", [node.output[0], shifts], [output], name=f"{node.name}/shift"))

    def linear(self, linear: Linear, node: NodeProto, keep: bool) -> None:
        name, bias = linear.name, self.equalised.biases[linear.name]
        output = self._output(linear, node)
        if keep:
            operands = [node.input[0], self.constant(f"{name}.float", self.equalised.float_weight(name))]
        else:
            grid = self.equalised.grids[name]
            values, steps = self.equalised.eight_bits[name]
            steps = halves(steps) if self.target == "trt" else steps
            source, shift = self.activation(linear, node.input[0], grid)
            if shift:
                bias = bias - shift * (values.astype(np.float64) * steps).sum(axis=0)
            zero = self.constant(f"{name}.weight_zero", np.zeros(len(steps), np.int8))
            inputs = [self.constant(f"{name}.int8", values), self.constant(f"{name}.weight_step", steps), zero]
            operands = [source, self.add("DequantizeLinear", inputs, f"{name}/weight", axis=1)]
        shape = (-1,) if keep else (1, 1, -1)
        if linear.add is None and not bias.any():
            self.nodes.append(helper.make_node("MatMul", operands, [output], name=linear.matmul))
            return
        self.nodes.append(helper.make_node("MatMul", operands, [f"{name}/product"], name=linear.matmul))
        constant = self.constant(f"{name}.bias_folded", bias.astype(np.float32).reshape(shape))
        self.nodes.append(helper.make_node("Add", [f"{name}/product", constant], [output], name=f"{name}/Add"))

    def activation(self, linear: Linear, source: str, grid: Grid) -> tuple[str, float]:
        """Quantise the input of one MatMul; return the dequantised tensor and the constant that was added to it.

        Layers that share an input each have a QuantizeLinear of their own, because ONNX Runtime's integer kernels take
        a signed input only if it has a single reader. Their steps differ in the last place, or ONNX Runtime would merge
        them.
        """
        if self.share and source in self.dequantised:
            return self.dequantised[source]
        shift, quantised = 0.0, f"{linear.name}/quantised"
        reader = self.readers[source] = self.readers.get(source, -1) + 1
        # FP16 must hold TensorRT's steps exactly, or narrowing would move the grid.
        value = np.float32(halves(grid.step) if self.target == "trt" else grid.step)
        for _ in range(reader):
            value = np.nextafter(value, np.float32(np.inf))
        hidden, signed = linear.kind == "hidden", grid.symmetric or self.target == "trt"
        step = self.constant(f"{linear.name}.step", value)
        zero = self.constant(f"{source}.zero", np.int8(0) if signed else np.uint8(grid.zero))
        if hidden and signed and not grid.symmetric:
            shift = (grid.zero - 128) * float(value)
        scaled = source
        if hidden and (grid.smooth != 1).any():
            factor = (1 / grid.smooth.astype(np.float64)).astype(np.float32).reshape(1, 1, -1)
            inputs = [scaled, self.constant(f"{linear.name}.smooth", factor)]
            scaled = self.add("Mul", inputs, f"{linear.name}/smooth")
        if shift:
            inputs = [scaled, self.constant(f"{linear.name}.shift", np.float32(shift))]
            scaled = self.add("Add", inputs, f"{linear.name}/shift")
        self.add("QuantizeLinear", [scaled, step, zero], quantised)
        self.dequantised[source] = self.add("DequantizeLinear", [quantised, step, zero], f"{linear.name}/input"), shift
        return self.dequantised[source]

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        if name not in self.made:
            self.made.add(name)
            array = np.asarray(value)
            if self.apart is None or array.nbytes < LEAST:
                tensor = numpy_helper.from_array(array, name)
            else:
                self.apart[name] = array
                tensor = absent(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            self.model.graph.initializer.append(tensor)
        return name

    def _output(self, linear: Linear, node: NodeProto) -> str:
        """Return the layer's output tensor, after its bias if it has one."""
        if linear.add is None:
            return node.output[0]
        return next(n.output[0] for n in self.model.graph.node if n.name == linear.add)
