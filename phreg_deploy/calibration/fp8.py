"""Write FP8 (E4M3) Q/DQ pairs around the linear layers and around attention's two products, where TensorRT fuses them.

FP8 has 3 bits of mantissa at any magnitude: an outlier costs range, not precision. Three things help: centring the
outputs of layer norms, smoothing them half-way (1 - cosine of the 1st percentile .057 -> .048 on a ViT-Tiny), and
rounding weights by GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from phreg_deploy.calibration.gptq import Format
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.external import LEAST, absent
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.wiring import Wiring, copy_without, replace_nodes
from phreg_deploy.quantisation import halves

# The largest E4M3 number without infinities (OCP 8-bit floating point, revision 1.0).
LARGEST = 448.0
# A softmax reaches 1, and TensorRT's fused FP8 attention expects exactly this scale.
SOFTMAX_STEP = 1 / LARGEST
# TensorRT-RTX 1.7 fuses FP8 attention from this number of tokens on, and FP16 attention at any number.
FUSED_FROM = 32
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
Weights = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_fp8(
    model: ModelProto,
    linears: list[Linear],
    largest: Mapping[str, float],
    keep: set[str],
    weights: Weights | None = None,
    attention: bool = True,
    apart: dict[str, np.ndarray] | None = None,
) -> ModelProto:
    """Copy ``model`` with per-channel FP8 weights and per-tensor FP8 activations.

    FP16 holds every scale exactly, so narrowing the graph later moves no grid.

    Args:
        largest: tensor -> its largest magnitude over the calibration images.
        keep: linear layers that stay in float, and ``blocks.N.attn`` for the products of one attention.
        weights: layer -> its E4M3 values ``(C, O)`` and steps ``(O,)``; other layers' weights are rounded here.
        attention: quantise the two products of attention too.
        apart: holds the large constants that are not in ``model``, and receives those that are written; by default all
            are in the graph.

    Raises:
        PhregError: a tensor without a range.
    """
    return _Writer(model, largest, weights or {}, apart).write(linears, keep, attention)


def quantise_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight ``(C, O)`` to E4M3 ``(C, O)`` and float32 steps ``(O,)``; a channel's largest magnitude is 448."""
    steps = halves(np.maximum(np.abs(weight).max(axis=0) / LARGEST, 2.0**-20))
    return np.clip(weight / steps, -LARGEST, LARGEST).astype(E4M3), steps


FP8 = Format(quantise_fp8, lambda scaled: np.clip(scaled, -LARGEST, LARGEST).astype(E4M3))


class _Writer:
    def __init__(
        self,
        model: ModelProto,
        largest: Mapping[str, float],
        weights: Weights,
        apart: dict[str, np.ndarray] | None,
    ) -> None:
        self.source, self.largest, self.weights, self.apart = model, largest, weights, apart
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}

    def write(self, linears: list[Linear], keep: set[str], attention: bool) -> ModelProto:
        wiring = Wiring(self.source, self.apart)
        eight = {linear.matmul: linear for linear in linears if linear.name not in keep}
        # All layers that read the same tensor share one Q/DQ pair.
        shared: dict[str, str] = {}
        for original in self.source.graph.node:
            node = NodeProto()
            node.CopyFrom(original)
            linear = eight.get(node.name)
            if linear is not None:
                source = node.input[0]
                if source not in shared:
                    shared[source] = self.pair(source, self.scale(source))
                node.input[0], node.input[1] = shared[source], self.weight(linear, wiring)
            elif attention and _is_attention(node, wiring) and node.name.split("/")[0] not in keep:
                for i, name in enumerate(list(node.input)):
                    softmax = wiring.producer[name].op_type == "Softmax"
                    node.input[i] = self.pair(name, SOFTMAX_STEP if softmax else self.scale(name))
            self.nodes.append(node)
        model = copy_without(self.source, {linear.weight for linear in eight.values()})
        model.graph.initializer.extend(self.made.values())
        replace_nodes(model, self.nodes)
        return model

    def scale(self, name: str) -> float:
        magnitude = self.largest.get(name)
        if magnitude is None or not np.isfinite(magnitude):
            raise PhregError(
                f"calibrate: the tensor {name} has no finite range; the bundle's weights are damaged, or phreg-deploy "
                "did not write its graph."
            )
        return max(magnitude, 1e-6) / LARGEST

    def pair(self, name: str, step: float) -> str:
        scale = self.constant(f"{name}.fp8_step", halves(step))
        zero = self.constant("fp8_zero", np.zeros((), E4M3))
        result = f"{name}/dequantized"
        for operator, source, target in (
            ("QuantizeLinear", name, f"{name}/fp8"),
            ("DequantizeLinear", f"{name}/fp8", result),
        ):
            node = helper.make_node(operator, [source, scale, zero], [target], name=f"{name}/{operator}")
            self.nodes.append(node)
        return result

    def weight(self, linear: Linear, wiring: Wiring) -> str:
        values, steps = self.weights.get(linear.name) or quantise_fp8(wiring.value(linear.weight))
        names = [self.constant(f"{linear.name}.fp8", values), self.constant(f"{linear.name}.weight_step", steps)]
        zero = self.constant(f"{linear.name}.weight_zero", np.zeros(len(steps), E4M3))
        result = f"{linear.name}/weight"
        name = f"{result}/DequantizeLinear"
        self.nodes.append(helper.make_node("DequantizeLinear", [*names, zero], [result], name=name, axis=1))
        return result

    def constant(self, name: str, value: np.ndarray) -> str:
        kind = TensorProto.FLOAT8E4M3FN if value.dtype == E4M3 else TensorProto.FLOAT
        if name in self.made:
            return name
        if self.apart is not None and value.nbytes >= LEAST:
            self.apart[name] = value
            self.made[name] = absent(name, kind, value.shape)
        else:
            data = np.ascontiguousarray(value).tobytes()
            self.made[name] = TensorProto(name=name, data_type=kind, dims=value.shape, raw_data=data)
        return name


def _is_attention(node: NodeProto, wiring: Wiring) -> bool:
    """Whether a node is one of attention's two products: before its softmax or after it."""
    # The class token's attention, which is an output of its own, stands outside the blocks.
    if (
        node.op_type != "MatMul"
        or not node.name.startswith("blocks.")
        or any(name in wiring.constants for name in node.input)
    ):
        return False
    before = wiring.producer.get(node.input[0])
    after = wiring.readers.get(node.output[0], [])
    return (before is not None and before.op_type == "Softmax") or any(n.op_type == "Softmax" for n in after)
