"""Cut a graph before its blocks, and run it part by part: no part runs twice, and few weights are loaded at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from phreg_deploy.onnx_graph.external import Arrays
from phreg_deploy.onnx_graph.session import open_session

BLOCK = re.compile(r"^blocks\.(\d+)[./]")
Feed = dict[str, np.ndarray]


def block_starts(model: ModelProto) -> list[int]:
    """The place of each block's first node in the order of nodes.

    The addition that ends the block before belongs to it, because ONNX Runtime fuses it with the norm that follows.
    """
    starts: list[int] = []
    last, before = "", None
    for place, node in enumerate(model.graph.node):
        match = BLOCK.match(node.name)
        if match and match[1] != last:
            last = match[1]
            starts.append(place - 1 if before is not None and before.op_type == "Add" else place)
        before = node
    return starts


def take_part(model: ModelProto, start: int, end: int | None = None) -> ModelProto:
    """Copy the nodes from ``start`` to ``end``; tensors that cross these places become inputs and outputs."""
    nodes = list(model.graph.node)
    inside, after = nodes[start:end], nodes[end:] if end is not None else []
    constants = {tensor.name for tensor in model.graph.initializer}
    made = [name for node in inside for name in node.output]
    read = dict.fromkeys(name for name in _read(inside) if name not in {*made, *constants, ""})
    later = {*_read(after), *(value.name for value in model.graph.output)}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    part = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = model.graph.name
    part.graph.node.extend(inside)
    part.graph.input.extend(known[name] for name in read)
    part.graph.output.extend(known[name] for name in made if name in later)
    used = set(_read(inside))
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    return part


def _read(nodes: Iterable[NodeProto]) -> list[str]:
    return [name for node in nodes for name in node.input]


class Walk:
    """Run a graph part by part on several feeds.

    ``at``: the place that was reached. ``states``: for each feed, the tensors that the nodes from there on read, and
    the outputs of the graph that are known.
    """

    def __init__(self, model: ModelProto, feeds: Iterable[Feed], arrays: Arrays | None, literal: bool = False) -> None:
        self.model, self.arrays, self.literal = model, arrays, literal
        self.at, self.states = 0, [dict(feed) for feed in feeds]

    def step(
        self,
        end: int | None,
        change: Callable[[ModelProto], ModelProto] = lambda part: part,
        receive: Callable[[Feed], None] = lambda _values: None,
    ) -> None:
        """Run the nodes up to ``end``, or to the end of the graph.

        Args:
            change: adds outputs to the part before it is run.
            receive: takes all outputs of the part for one feed after another.
        """
        part = take_part(self.model, self.at, end)
        own = [value.name for value in part.graph.output]
        session = open_session(change(part), literal=self.literal, arrays=self.arrays)
        kept = {value.name for value in self.model.graph.output}
        kept.update(_read(list(self.model.graph.node)[end:] if end is not None else []))
        for i, state in enumerate(self.states):
            values = _run(session, state)
            receive(values)
            joined = {**state, **{name: values[name] for name in own}}
            self.states[i] = {name: value for name, value in joined.items() if name in kept}
            del values
        self.at = len(self.model.graph.node) if end is None else end

    def rest(self, model: ModelProto, start: int, arrays: Arrays | None) -> list[Feed]:
        """Run another graph from its place ``start`` on the present states; return its outputs for each feed."""
        session = open_session(take_part(model, start), literal=self.literal, arrays=arrays)
        names = [value.name for value in model.graph.output]
        answers = [{**state, **_run(session, state)} for state in self.states]
        return [{name: values[name] for name in names} for values in answers]


def _run(session: Any, state: Feed) -> Feed:
    inputs = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: state[name] for name in inputs})))
