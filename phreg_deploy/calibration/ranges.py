"""Ranges of every linear layer's input over the calibration images. Memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.linears import Linear
from phreg_deploy.onnx_graph.mixed_precision import float_tensors
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.quantisation import Range
from phreg_deploy.spec import ModelSpec

Ranges = dict[str, dict[str, Range]]  # input tensor -> "all" and "others" (without the register rows) -> per channel


def observe_ranges(
    model: ModelProto,
    linears: list[Linear],
    spec: ModelSpec,
    feeds: Iterable[tuple[dict[str, np.ndarray], int]],
    advance: Callable[[int], None],
) -> Ranges:
    """Smallest and largest value per channel, reduced inside the graph, one batch at a time.

    Raises:
        PhregError: a value that is not finite, with the layer it feeds.
    """
    sources = list(dict.fromkeys(linear.source for linear in linears))
    names = {linear.source: linear.name for linear in linears}
    rows = _rows(spec)
    session = open_session(_instrumented(model, sources, rows))
    wanted = [f"{kind}/{part}/{source}" for source in sources for part in rows for kind in ("low", "high")]
    found: dict[str, dict[str, Range]] = {source: {} for source in sources}
    for feed, count in feeds:
        values = dict(zip(wanted, session.run(wanted, feed)))
        for source in sources:
            for part in rows:
                now = Range(values[f"low/{part}/{source}"], values[f"high/{part}/{source}"])
                if not (np.isfinite(now.low).all() and np.isfinite(now.high).all()):
                    raise PhregError(
                        f"calibrate: the input of {names[source]} is not finite; the bundle's weights are damaged."
                    )
                before = found[source].get(part)
                found[source][part] = now if before is None else before.join(now)
        advance(count)
    if not all(found.values()):
        raise PhregError("calibrate: got no image to calibrate on.")
    return {source: _summary(parts) for source, parts in found.items()}


def _rows(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Kinds of rows, as the model lays its tokens out: class, registers, patches."""
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
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    constant = lambda name, value: graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))  # noqa: E731
    constant("observe/axis", [1])
    constant("observe/axes", [0, 1])
    for part, (start, end) in rows.items():
        constant(f"observe/{part}/start", [start])
        constant(f"observe/{part}/end", [end])
    for source in sources:
        for part in rows:
            cut = f"{part}/{source}"
            graph.node.append(
                helper.make_node(
                    "Slice", [source, f"observe/{part}/start", f"observe/{part}/end", "observe/axis"], [cut]
                )
            )
            for kind, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
                graph.node.append(helper.make_node(operator, [cut, "observe/axes"], [f"{kind}/{cut}"], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(f"{kind}/{cut}", TensorProto.FLOAT, None))
    return watched


def observe_magnitudes(
    model: ModelProto, feeds: Iterable[tuple[dict[str, np.ndarray], int]], advance: Callable[[int], None]
) -> dict[str, float]:
    """The largest magnitude in every float tensor of a graph, which decides what FP16 can hold and where FP8's 448 lies."""
    session = open_session(_watched(model))
    names = [output.name for output in session.get_outputs()]
    found: dict[str, float] = {}
    for feed, count in feeds:
        for name, value in zip(names, session.run(names, feed)):
            tensor = name.removeprefix("largest/")
            found[tensor] = max(float(value), found.get(tensor, 0.0))
        advance(count)
    return found


def _watched(model: ModelProto) -> ModelProto:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    floats = float_tensors(watched)
    del graph.output[:]
    for name in [name for node in graph.node for name in node.output if name in floats]:
        graph.node.append(helper.make_node("Abs", [name], [f"magnitude/{name}"]))
        graph.node.append(helper.make_node("ReduceMax", [f"magnitude/{name}"], [f"largest/{name}"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"largest/{name}", TensorProto.FLOAT, []))
    return watched
