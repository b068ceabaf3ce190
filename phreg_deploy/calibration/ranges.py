"""Observe the ranges of tensors over the calibration images; memory does not grow with the number of images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.external import Arrays
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.mixed_precision import float_tensors
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.wiring import copy_without_outputs
from phreg_deploy.progress import Advance
from phreg_deploy.quantisation import Range
from phreg_deploy.spec import ModelSpec

# Input tensor -> "all" rows and "others" (all but the register rows) -> range per channel.
Ranges = dict[str, dict[str, Range]]


def observe_ranges(
    model: ModelProto,
    linears: list[Linear],
    spec: ModelSpec,
    feeds: Iterable[tuple[dict[str, np.ndarray], int]],
    advance: Advance,
    arrays: Arrays | None = None,
) -> Ranges:
    """Observe the range per channel of every linear layer's input; the graph itself reduces the values.

    ``arrays``: the constants that are not in the graph.

    Raises ``PhregError`` without an image, or for a value that is not finite; the message names the layer.
    """
    sources = list(dict.fromkeys(linear.source for linear in linears))
    names = {linear.source: linear.name for linear in linears}
    rows = _rows(spec)
    session = open_session(_instrumented(model, sources, rows), arrays=arrays)
    wanted = [f"{kind}/{part}/{source}" for source in sources for part in rows for kind in ("low", "high")]
    ranges: dict[str, dict[str, Range]] = {source: {} for source in sources}
    for feed, count in feeds:
        values = dict(zip(wanted, session.run(wanted, feed)))
        for source in sources:
            for part in rows:
                now = Range(values[f"low/{part}/{source}"], values[f"high/{part}/{source}"])
                if not (np.isfinite(now.low).all() and np.isfinite(now.high).all()):
                    raise PhregError(f"calibrate: the input of {names[source]} is not finite; weights are damaged.")
                before = ranges[source].get(part)
                ranges[source][part] = now if before is None else before.join(now)
        advance(count)
    if not all(ranges.values()):
        raise PhregError("calibrate: got no image to calibrate on.")
    return {source: _summary(parts) for source, parts in ranges.items()}


def _rows(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return the first and last row of class token, registers and patches, in the model's token order."""
    first = int(spec.class_token)
    rows = {"patches": (spec.prefix_tokens, np.iinfo(np.int64).max)}
    if spec.class_token:
        rows["class"] = (0, 1)
    if spec.registers:
        rows["registers"] = (first, first + spec.registers)
    return rows


def _summary(parts: dict[str, Range]) -> dict[str, Range]:
    others = parts["patches"].join(parts.get("class", parts["patches"]))
    return {"all": others.join(parts.get("registers", others)), "others": others}


def _instrumented(model: ModelProto, sources: list[str], rows: dict[str, tuple[int, int]]) -> ModelProto:
    instrumented = copy_without_outputs(model)
    graph = instrumented.graph

    def constant(name: str, value: list[int]) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))

    constant("observe/axis", [1])
    constant("observe/axes", [0, 1])
    for part, (start, end) in rows.items():
        constant(f"observe/{part}/start", [start])
        constant(f"observe/{part}/end", [end])
    for source in sources:
        for part in rows:
            cut = f"{part}/{source}"
            inputs = [source, f"observe/{part}/start", f"observe/{part}/end", "observe/axis"]
            graph.node.append(helper.make_node("Slice", inputs, [cut]))
            for kind, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
                graph.node.append(helper.make_node(operator, [cut, "observe/axes"], [f"{kind}/{cut}"], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(f"{kind}/{cut}", TensorProto.FLOAT, None))
    return instrumented


def observe_magnitudes(
    model: ModelProto,
    feeds: Iterable[tuple[dict[str, np.ndarray], int]],
    advance: Advance,
    arrays: Arrays | None = None,
) -> dict[str, float]:
    """Observe the largest magnitude of every float tensor: FP16 must hold it, and FP8's 448 stands for it."""
    session = open_session(_with_magnitudes(model), arrays=arrays)
    names = [output.name for output in session.get_outputs()]
    largest: dict[str, float] = {}
    for feed, count in feeds:
        for name, value in zip(names, session.run(names, feed)):
            tensor = name.removeprefix("largest/")
            largest[tensor] = max(float(value), largest.get(tensor, 0.0))
        advance(count)
    return largest


def _with_magnitudes(model: ModelProto) -> ModelProto:
    instrumented = copy_without_outputs(model)
    graph, floats = instrumented.graph, float_tensors(model)
    for name in [name for node in graph.node for name in node.output if name in floats]:
        graph.node.append(helper.make_node("Abs", [name], [f"magnitude/{name}"]))
        graph.node.append(helper.make_node("ReduceMax", [f"magnitude/{name}"], [f"largest/{name}"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"largest/{name}", TensorProto.FLOAT, []))
    return instrumented
