"""Find the linear layers of a bundle's graph, and what feeds each of them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.wiring import Wiring


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: a ``MatMul`` with a constant weight ``(C, O)``, and the ``Add`` of its bias if any.

    ``kind``: what feeds it, "norm", "value" or "hidden" (``quantisation.Smoothing``). ``size``: C * O
    multiply-accumulates per token. ``feeder``: the name of the layer norm, or of the linear layer whose
    ``columns`` are the values.
    """

    name: str
    matmul: str
    add: str | None
    source: str
    weight: str
    bias: str | None
    kind: str
    size: int
    feeder: str = ""
    columns: tuple[int, int] = (0, 0)


def find_linears(model: ModelProto) -> list[Linear]:
    """List the linear layers of the blocks in the order in which they run. Raises ``PhregError`` if there are none."""
    wiring = Wiring(model)
    linears: dict[str, Linear] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("blocks.") and node.input[1] in wiring.constants:
            linear = _linear(node, wiring, linears)
            linears[linear.name] = linear
    if not linears:
        raise PhregError("calibrate: the graph names no blocks; it was written by an older version. Export it again.")
    return list(linears.values())


def by_source(linears: list[Linear]) -> dict[str, list[Linear]]:
    """Group the layers by the input that they read, in the order in which they run."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.source, []).append(linear)
    return groups


def _linear(node: NodeProto, wiring: Wiring, before: dict[str, Linear]) -> Linear:
    shape = tuple(wiring.constants[node.input[1]].dims)
    add = bias = None
    following = wiring.readers.get(node.output[0], [])
    if len(following) == 1 and following[0].op_type == "Add":
        other = [name for name in following[0].input if name in wiring.constants]
        if other and tuple(wiring.constants[other[0]].dims)[-1:] == shape[1:]:
            add, bias = following[0].name, other[0]
    kind, feeder, columns = _feeder(node.input[0], wiring, before)
    name = node.name.removesuffix("/MatMul")
    return Linear(name, node.name, add, node.input[0], node.input[1], bias, kind, shape[0] * shape[1], feeder, columns)


def _feeder(source: str, wiring: Wiring, before: dict[str, Linear]) -> tuple[str, str, tuple[int, int]]:
    """Return kind, feeder and columns of the tensor ``source``; see ``Linear``."""
    norm = wiring.producer.get(source)
    readers = wiring.readers[source]
    if (
        norm is not None
        and norm.op_type == "LayerNormalization"
        and all(r.op_type == "MatMul" and r.input[0] == source for r in readers)
    ):
        return "norm", norm.name, (0, 0)
    product = wiring.back(source, "Reshape", "Transpose", "MatMul")
    if product is not None and len(readers) == 1:
        split = wiring.back(product.input[1], "Transpose", "Reshape", "Split")
        weights = wiring.producer.get(product.input[0])
        if split is not None and weights is not None and weights.op_type == "Softmax":
            values = wiring.back(product.input[1], "Transpose", "Reshape").input[0]  # type: ignore[union-attr]
            for linear in before.values():
                ends = {linear.matmul, linear.add} - {None}
                if wiring.producer[split.input[0]].name in ends:
                    third = wiring.constants[linear.weight].dims[1] // len(split.output)
                    place = list(split.output).index(values)
                    return "value", linear.name, (place * third, (place + 1) * third)
    return "hidden", "", (0, 0)
