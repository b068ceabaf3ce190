"""Append a linear head to a graph that serves dense features. B batch, (Hp, Wp) patch grid, C channels, K outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.bundle.heads import LARGEST_EXPONENT, ServedHead
from phreg_deploy.layers import DEPTH, LABELS, SEGMENTATION
from phreg_deploy.onnx_graph.upsampling import Upsampler


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
        patch: (height, width) in pixels.
        bins, depth_range: as of ``heads.Head``.
    """
    cells = served.cells(patch)
    graph, prefix = model.graph, f"head.{served.output}"
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    shapes = {value.name: value.type.tensor_type.shape for value in graph.output}

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), f"{prefix}.{name}"))
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
    upsampler = None if served.upsampling is None else Upsampler(node, constant, served.upsampling, patch, cells)
    if upsampler is not None:
        x = upsampler.enlarge(x, "image", len(weight))
    if served.kind == LABELS:
        x = node("ArgMax", "largest", x, axis=-1, keepdims=1)
    elif served.kind == DEPTH:
        x = _depth(node, constant, x, bins)
        if depth_range is not None:
            low, high = (constant(name, np.float32(value)) for name, value in zip(("low", "high"), depth_range))
            x = node("Clip", "clipped", x, low, high)
    if upsampler is not None:
        x = upsampler.arrange("pixels", x, len(weight) if served.kind == SEGMENTATION else 1)
    if served.kind != SEGMENTATION:
        x = node("Squeeze", "map", x, constant("last_axis", np.array([3], np.int64)))
    if served.kind == LABELS:
        x = node("Cast", "labels", x, to=TensorProto.UINT8)
    # TensorRT takes 8-bit classes as an output of the graph alone, not between two nodes.
    graph.node[-1].output[0] = served.output
    sides = [side.dim_value or side.dim_param for side in shapes[inputs[0]].dim]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(served.dtype))
    finer = [_finer(side, count, served.stride) for side, count in zip(sides[1:3], cells)]
    shape = list(served.shape(sides[0], finer))
    graph.output.append(helper.make_tensor_value_info(served.output, kind, shape))


def read_head(model: ModelProto, served: ServedHead) -> dict[str, Any]:
    """Read what ``append_head`` wrote: ``weight``, ``bias``, ``bins`` and ``depth_range``, as its arguments."""
    prefix = f"head.{served.output}."
    own = {t.name[len(prefix) :]: t for t in model.graph.initializer if t.name.startswith(prefix)}
    values = {
        name: numpy_helper.to_array(own[name]) for name in ("weight", "bias", "bins", "low", "high") if name in own
    }
    bins = values.get("bins")
    return {
        "weight": np.ascontiguousarray(values["weight"].T),
        "bias": values["bias"],
        "bins": None if bins is None else tuple(map(float, bins.reshape(-1))),
        "depth_range": (float(values["low"]), float(values["high"])) if "low" in values else None,
    }


def _finer(side: int | str, cells: int, stride: int | None) -> int | str:
    """Return a side of the enlarged grid: its number, or the name of a free one."""
    if stride is None:
        return side
    return side * cells if isinstance(side, int) else f"{side}_by_{stride}"


def _depth(node: Any, constant: Any, x: str, bins: Sequence[float] | None) -> str:
    """Turn logits ``(..., K)`` into depth ``(..., 1)``."""
    if bins is None:
        bound = [
            constant(name, np.float32(value))
            for name, value in (("least", -LARGEST_EXPONENT), ("most", LARGEST_EXPONENT))
        ]
        return str(node("Exp", "depth", node("Clip", "bounded", x, *bound)))
    shares = node("Softmax", "shares_of_bins", x, axis=-1)
    return str(node("MatMul", "depth", shares, constant("bins", np.array(bins, np.float32)[:, None])))
