"""Append a head, linear or of text embeddings, to a graph that serves dense features.

B batch, (Hp, Wp) patch grid, C channels, K outputs, S text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.bundle.heads import LARGEST_EXPONENT, LEAST_NORM, PromptRule, ServedHead
from phreg_deploy.layers import DEPTH, LABELS, SEGMENTATION
from phreg_deploy.onnx_graph.upsampling import Upsampler

# The constants that a rule of text embeddings is read from.
RULE = ("prompts.least", "prompts.rows", "prompts.log")


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
    rule: PromptRule | None = None,
) -> None:
    """Add the nodes of a head and its output, in place. They compute in float32, whatever the rest does.

    Args:
        weight: float32 ``(K, C)``. bias: float32 ``(K,)``.
        inputs: outputs of the graph that are joined along C, float32 or float16 ``(B, Hp, Wp, .)``.
        patch: (height, width) in pixels.
        bins, depth_range: as of ``heads.Head``.
        rule: the rows of ``weight`` are text embeddings times a scale: the features are normalised to unit length
            first, and the rule turns the scores into those of classes.
    """
    cells = served.cells(patch)
    graph, prefix = model.graph, f"head.{served.output}"
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    shapes = {value.name: value.type.tensor_type.shape for value in graph.output}

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), f"{prefix}.{name}"))
        return f"{prefix}.{name}"

    def node(kind: str, name: str, *sources: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        made = f"{prefix}/{name}"
        graph.node.append(helper.make_node(kind, list(sources), outputs or [made], name=f"{made}/{kind}", **attributes))
        return made

    def as_float(source: str) -> str:
        if kinds[source] == TensorProto.FLOAT:
            return source
        return node("Cast", f"{source}.float", source, to=TensorProto.FLOAT)

    parts = [as_float(source) for source in inputs]
    x = parts[0] if len(parts) == 1 else node("Concat", "joined", *parts, axis=-1)
    features = x
    x = node("MatMul", "product", x, constant("weight", weight.T.astype(np.float32)))
    if rule is not None:
        # Dividing the scores costs less than dividing the features.
        axis = constant("prompts.channels", np.array([-1], np.int64))
        length = node("ReduceL2", "prompts.length", features, axis, keepdims=1)
        length = node("Max", "prompts.least_length", length, constant("prompts.least", np.float32(LEAST_NORM)))
        x = node("Div", "prompts.cosine", x, length)
    x = node("Add", "logits", x, constant("bias", bias.astype(np.float32)))
    if rule is not None and (max(rule.counts) > 1 or rule.background is not None):
        x = _classes(node, constant, x, rule)
    channels = len(weight) if rule is None else len(served.classes)
    upsampler = None if served.upsampling is None else Upsampler(node, constant, served.upsampling, patch, cells)
    if upsampler is not None:
        x = upsampler.enlarge(x, "image", channels)
    if served.kind == LABELS:
        x = node("ArgMax", "largest", x, axis=-1, keepdims=1)
    elif served.kind == DEPTH:
        x = _depth(node, constant, x, bins)
        if depth_range is not None:
            low, high = (constant(name, np.float32(value)) for name, value in zip(("low", "high"), depth_range))
            x = node("Clip", "clipped", x, low, high)
    if upsampler is not None:
        x = upsampler.arrange("pixels", x, channels if served.kind == SEGMENTATION else 1)
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
    """Read what ``append_head`` wrote: ``weight``, ``bias``, ``bins``, ``depth_range``, ``rule``, as its arguments."""
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
        "rule": _read_rule({name: numpy_helper.to_array(own[name]) for name in RULE if name in own}, values, served),
    }


def _read_rule(found: dict[str, np.ndarray], values: dict[str, np.ndarray], served: ServedHead) -> PromptRule | None:
    """Read the rule of text embeddings from its constants; None for a linear head."""
    least, rows, log = (found.get(name) for name in RULE)
    if least is None:
        return None
    counts = (1,) * len(values["bias"]) if rows is None else tuple(len(np.unique(row)) for row in rows)
    first = log is not None and len(counts) == len(served.classes)
    return PromptRule(counts, None if log is None else float(log), first)


def _finer(side: int | str, cells: int, stride: int | None) -> int | str:
    """Return a side of the enlarged grid: its number, or the name of a free one."""
    if stride is None:
        return side
    return side * cells if isinstance(side, int) else f"{side}_by_{stride}"


def _classes(node: Any, constant: Any, x: str, rule: PromptRule) -> str:
    """Turn scores of embeddings ``(B, Hp, Wp, S)`` into scores of classes ``(B, Hp, Wp, K)``."""
    scores, axis = x, constant("prompts.classes_axis", np.array([-1], np.int64))
    if max(rule.counts) > 1:
        starts = np.cumsum((0, *rule.counts[:-1]))
        # Every row is a class's embeddings, the first repeated until all rows are as long.
        rows = [[start + (i if i < n else 0) for i in range(max(rule.counts))] for start, n in zip(starts, rule.counts)]
        x = node("Gather", "prompts.synonyms", x, constant("prompts.rows", np.array(rows, np.int64)), axis=3)
        x = node("ReduceMax", "prompts.classes", x, axis, keepdims=0)
    if rule.background is None:
        return x
    top = node("ReduceMax", "prompts.top", scores, axis, keepdims=1)
    shares = node("Exp", "prompts.shares", node("Sub", "prompts.below_top", scores, top))
    total = node("Log", "prompts.log_total", node("ReduceSum", "prompts.total", shares, axis, keepdims=1))
    log = constant("prompts.log", np.float32(rule.background))
    least = node("Add", "prompts.least_score", node("Add", "prompts.log_sum_exp", total, top), log)
    if not rule.first:
        return str(node("Concat", "prompts.with_background", least, x, axis=3))
    if len(rule.counts) == 1:
        return str(node("Max", "prompts.background", x, least))
    sizes = constant("prompts.sizes", np.array([1, len(rule.counts) - 1], np.int64))
    names = [f"{x}.first", f"{x}.others"]
    node("Split", "prompts.apart", x, sizes, axis=3, outputs=names)
    first = node("Max", "prompts.background", names[0], least)
    return str(node("Concat", "prompts.with_background", first, names[1], axis=3))


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
