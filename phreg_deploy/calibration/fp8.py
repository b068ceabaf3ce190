"""Writes FP8 (E4M3) Q/DQ pairs around the linear layers and around attention's two products, as TensorRT fuses them.

FP8 keeps a mantissa of 3 bits at any magnitude: an outlier costs range, not precision. What helps is to centre the layer norms'
outputs and to smooth them half-way (1 - cosine of the 1st percentile .057 -> .048 on a ViT-Tiny), and to round weights by GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from phreg_deploy.calibration.gptq import Format
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.wiring import Wiring, copy_without, replace_nodes
from phreg_deploy.quantisation import halves

LARGEST = 448.0  # of E4M3 without infinities (OCP 8-bit floating point, revision 1.0)
SOFTMAX_STEP = 1 / LARGEST  # a softmax reaches 1; TensorRT's fused FP8 attention expects this very scale
FUSED_FROM = 32  # tokens: TensorRT-RTX 1.7 fuses FP8 attention from there on, and FP16's at any number
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def write_fp8(
    model: ModelProto, linears: list[Linear], largest: Mapping[str, float], keep: set[str],
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None, attention: bool = True,
) -> ModelProto:  # fmt: skip
    """A copy of ``model`` with per-channel FP8 weights and per-tensor FP8 activations wherever ``keep`` does not forbid it.

    Every scale is a number that FP16 holds exactly, so that the graph can be narrowed afterwards without moving a grid.

    Args:
        largest: tensor -> its largest magnitude over the calibration images.
        keep: linear layers, and ``blocks.N.attn`` for the products of one attention, that stay in float.
        weights: layer -> its E4M3 values ``(C, O)`` and steps ``(O,)``; rounded here where not given.
        attention: quantize the two products of attention too.

    Raises:
        PhregError: a tensor without a range.
    """
    return _Writer(model, largest, weights or {}).write(linears, keep, attention)


def quantise_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(C, O)`` -> E4M3 ``(C, O)`` and float32 steps ``(O,)``, the largest magnitude of each output channel at 448."""
    steps = halves(np.maximum(np.abs(weight).max(axis=0) / LARGEST, 2.0**-20))
    return np.clip(weight / steps, -LARGEST, LARGEST).astype(E4M3), steps


FP8 = Format(quantise_fp8, lambda scaled: np.clip(scaled, -LARGEST, LARGEST).astype(E4M3))


class _Writer:
    def __init__(
        self, model: ModelProto, largest: Mapping[str, float], weights: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.source, self.largest, self.weights = model, largest, weights
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}

    def write(self, linears: list[Linear], keep: set[str], attention: bool) -> ModelProto:
        wiring = Wiring(self.source)
        eight = {linear.matmul: linear for linear in linears if linear.name not in keep}
        shared: dict[str, str] = {}  # one Q/DQ for all layers that read the same tensor
        for original in self.source.graph.node:
            node = NodeProto()
            node.CopyFrom(original)
            linear = eight.get(node.name)
            if linear is not None:
                source = node.input[0]
                if source not in shared:
                    shared[source] = self.pair(source, self.scale(source))
                node.input[0], node.input[1] = shared[source], self.weight(linear, wiring.value(linear.weight))
            elif (
                attention
                and node.op_type == "MatMul"
                and _attends(node, wiring)
                and node.name.split("/")[0] not in keep
            ):
                for i, name in enumerate(list(node.input)):
                    softmax = wiring.producer[name].op_type == "Softmax"
                    node.input[i] = self.pair(name, SOFTMAX_STEP if softmax else self.scale(name))
            self.nodes.append(node)
        model = copy_without(self.source, {linear.weight for linear in eight.values()})
        model.graph.initializer.extend(self.made.values())
        replace_nodes(model, self.nodes)
        return model

    def scale(self, name: str) -> float:
        found = self.largest.get(name)
        if found is None or not np.isfinite(found):
            raise PhregError(
                f"calibrate: the tensor {name} has no finite range; the bundle's weights are damaged, or its graph is not ours."
            )
        return max(found, 1e-6) / LARGEST

    def pair(self, name: str, step: float) -> str:
        scale = self.constant(f"{name}.fp8_step", halves(step))
        zero = self.constant("fp8_zero", np.zeros((), E4M3))
        self.nodes.append(
            helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}/fp8"], name=f"{name}/QuantizeLinear")
        )
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}/fp8", scale, zero],
                [f"{name}/dequantized"],
                name=f"{name}/DequantizeLinear",
            )
        )
        return f"{name}/dequantized"

    def weight(self, linear: Linear, value: np.ndarray) -> str:
        values, steps = self.weights.get(linear.name) or quantise_fp8(value)
        names = [self.constant(f"{linear.name}.fp8", values), self.constant(f"{linear.name}.weight_step", steps)]
        zero = self.constant(f"{linear.name}.weight_zero", np.zeros(len(steps), E4M3))
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [*names, zero],
                [f"{linear.name}/weight"],
                name=f"{linear.name}/weight/DequantizeLinear",
                axis=1,
            )
        )
        return f"{linear.name}/weight"

    def constant(self, name: str, value: np.ndarray) -> str:
        kind = TensorProto.FLOAT8E4M3FN if value.dtype == E4M3 else TensorProto.FLOAT
        self.made.setdefault(
            name,
            TensorProto(name=name, data_type=kind, dims=value.shape, raw_data=np.ascontiguousarray(value).tobytes()),
        )
        return name


def _attends(node: NodeProto, wiring: Wiring) -> bool:
    """Whether a product is one of the two of attention: into a softmax, or out of one."""
    if any(name in wiring.constants for name in node.input):
        return False
    before = wiring.producer.get(node.input[0])
    after = wiring.readers.get(node.output[0], [])
    return (before is not None and before.op_type == "Softmax") or any(n.op_type == "Softmax" for n in after)
