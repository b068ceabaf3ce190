"""Look up producers, readers and constants of an ONNX graph, and replace its nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper


class Wiring:
    """The producer, the readers and the constants of every tensor of a graph, by the tensor's name.

    ``arrays``: the values of constants that are not in the graph.
    """

    def __init__(self, model: ModelProto, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        self.model, self.arrays = model, arrays or {}
        self.constants: dict[str, TensorProto] = {i.name: i for i in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def value(self, name: str) -> np.ndarray:
        """The values of a constant; they may be read-only."""
        return self.arrays[name] if name in self.arrays else numpy_helper.to_array(self.constants[name])

    def back(self, name: str, *kinds: str) -> NodeProto | None:
        """Walk from a tensor to its producers, which must be ``kinds`` in this order; None if one differs."""
        node = None
        for kind in kinds:
            node = self.producer.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0]
        return node


def copy_without_outputs(model: ModelProto) -> ModelProto:
    """Copy a graph, so that nodes and outputs which measure it can be added."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    return copy


def copy_without(model: ModelProto, weights: set[str]) -> ModelProto:
    """Copy a graph without the constants ``weights``."""
    copy = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    copy.opset_import.extend(model.opset_import)
    copy.metadata_props.extend(model.metadata_props)
    copy.graph.name = model.graph.name
    copy.graph.input.extend(model.graph.input)
    copy.graph.output.extend(model.graph.output)
    copy.graph.node.extend(model.graph.node)
    copy.graph.initializer.extend(i for i in model.graph.initializer if i.name not in weights)
    return copy


def keep_outputs(model: ModelProto, names: Collection[str]) -> None:
    """Drop the other outputs of a graph, and the nodes and constants that only they need, in place."""
    outputs = [value for value in model.graph.output if value.name in names]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    needed, kept = {value.name for value in outputs}, []
    # Nodes stand after those that they read.
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    replace_nodes(model, kept[::-1])


def replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Replace the nodes of a graph, and drop the constants that no node reads."""
    graph = model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(constants)
