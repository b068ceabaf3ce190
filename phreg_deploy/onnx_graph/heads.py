"""Append a linear head to a graph that serves dense features. B batch, (Hp, Wp) patch grid, C channels, K outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.bundle.heads import LARGEST_EXPONENT, ServedHead
from phreg_deploy.layers import DEPTH, LABELS


def append_head(
    model: ModelProto,
    served: ServedHead,
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    inputs: Sequence[str],
    patch: tuple[int, int],
    bins: Sequence[float] | None = None,
    depth_range: tuple[float, float] | None = None,
) -> None:
    """Add the nodes of a head and its output, in place. They compute in float32, whatever the rest does.

    Args:
        weight: float32 ``(K, C)``. bias: float32 ``(K,)``.
        inputs: outputs of the graph that are joined along C, float32 or float16 ``(B, Hp, Wp, .)``.
        patch: (height, width) in pixels, the factors by which ``upsampled`` enlarges.
        bins, depth_range: as of ``heads.Head``.
    """
    graph, prefix = model.graph, f"head.{served.output}"
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    shapes = {value.name: value.type.tensor_type.shape for value in graph.output}

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), f"{prefix}.{name}"))
        return f"{prefix}.{name}"

    def node(kind: str, name: str, *sources: str, **attributes: Any) -> str:
        made = f"{prefix}/{name}"
        graph.node.append(helper.make_node(kind, list(sources), [made], name=f"{made}/{kind}", **attributes))
        return made

    def as_float(source: str) -> str:
        if kinds[source] == TensorProto.FLOAT:
            return source
        return node("Cast", f"{source}.float", source, to=TensorProto.FLOAT)

    parts = [as_float(source) for source in inputs]
    x = parts[0] if len(parts) == 1 else node("Concat", "joined", *parts, axis=-1)
    x = node("MatMul", "product", x, constant("weight", weight.T.astype(np.float32)))
    x = node("Add", "logits", x, constant("bias", bias.astype(np.float32)))
    # Resize and the choice of a class work on (B, K, Hp, Wp).
    if served.upsampled:
        x = node("Transpose", "channels_first", x, perm=[0, 3, 1, 2])
        scales = constant("scales", np.array([1, 1, *patch], np.float32))
        x = node("Resize", "pixels", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    axis = 1 if served.upsampled else 3
    if served.kind == LABELS:
        x = node("ArgMax", "largest", x, axis=axis, keepdims=0)
        x = node("Cast", "labels", x, to=TensorProto.UINT8)
    elif served.kind == DEPTH:
        x = _depth(node, constant, x, axis, bins)
        if depth_range is not None:
            low, high = (constant(name, np.float32(value)) for name, value in zip(("low", "high"), depth_range))
            x = node("Clip", "clipped", x, low, high)
    elif served.upsampled:
        x = node("Transpose", "channels_last", x, perm=[0, 2, 3, 1])
    graph.node.append(helper.make_node("Identity", [x], [served.output], name=f"{prefix}/Identity"))
    sides = [side.dim_value or side.dim_param for side in shapes[inputs[0]].dim]
    image = next(value for value in graph.input if value.name == "image").type.tensor_type.shape
    pixels = [side.dim_value or side.dim_param for side in image.dim][1:3]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(served.dtype))
    shape = list(served.shape(sides[0], sides[1:3], pixels))
    graph.output.append(helper.make_tensor_value_info(served.output, kind, shape))


def _depth(node: Any, constant: Any, x: str, axis: int, bins: Sequence[float] | None) -> str:
    """Turn logits into depth, and drop the axis of logits."""
    if bins is None:
        bound = [
            constant(name, np.float32(value))
            for name, value in (("least", -LARGEST_EXPONENT), ("most", LARGEST_EXPONENT))
        ]
        x = node("Exp", "exponential", node("Clip", "bounded", x, *bound))
        return str(node("Squeeze", "depth", x, constant("axis", np.array([axis], np.int64))))
    shares = node("Softmax", "shares", x, axis=axis)
    shape = [-1 if i == axis else 1 for i in range(4)]
    weighted = node("Mul", "weighted", shares, constant("bins", np.array(bins, np.float32).reshape(shape)))
    return str(node("ReduceSum", "depth", weighted, constant("axis", np.array([axis], np.int64)), keepdims=0))
