"""One fused qkv projection in 8 bits -> three products: how TensorRT keeps it in 8 bits.

Its compiler cuts a fused projection at the Split after it. In FP16 it joins the parts again and nothing is lost; in 8 bits
it cuts the *dequantized* weight, on every inference, and computes the projection in float (seen in plans of TensorRT-RTX 1.7).
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from phreg_deploy.onnx_graph.wiring import Wiring, replace_nodes


def split_projections(model: ModelProto) -> ModelProto:
    """Cut, in place, every 8-bit product whose result goes through nothing but a bias into a Split: same numbers, three nodes."""
    wiring = Wiring(model)
    replaced: dict[str, list[NodeProto]] = {}
    gone: set[str] = set()
    for split in model.graph.node:
        if split.op_type != "Split":
            continue
        add = wiring.producer.get(split.input[0])
        product = add
        if add is not None and add.op_type == "Add":
            bias = next((name for name in add.input if name in wiring.constants), None)
            product = wiring.producer.get(next((n for n in add.input if n != bias), ""))
        else:
            add, bias = None, None
        weight = None if product is None or product.op_type != "MatMul" else wiring.producer.get(product.input[1])
        if product is None or weight is None or weight.op_type != "DequantizeLinear":
            continue
        replaced[split.name] = _parts(model, wiring, split, product, add, bias, weight)
        gone |= {node.name for node in (add, product, weight) if node is not None}
    nodes = [new for node in model.graph.node if node.name not in gone for new in replaced.get(node.name, [node])]
    replace_nodes(model, nodes)
    return model


def _parts(
    model: ModelProto,
    wiring: Wiring,
    split: NodeProto,
    product: NodeProto,
    add: NodeProto | None,
    bias: str | None,
    weight: NodeProto,
) -> list[NodeProto]:
    nodes, count = [], len(split.output)
    for i, output in enumerate(split.output):
        cut = lambda name, i=i: _cut(model, wiring.constants[name], i, count)  # noqa: E731
        base = f"{product.name.removesuffix('/MatMul')}.{'qkv'[i] if count == 3 else i}"
        operands = [cut(name) for name in weight.input]
        nodes.append(
            helper.make_node(
                "DequantizeLinear", operands, [f"{base}/weight"], name=f"{base}/weight/DequantizeLinear", axis=1
            )
        )
        result = output if add is None else f"{base}/product"
        nodes.append(helper.make_node("MatMul", [product.input[0], f"{base}/weight"], [result], name=f"{base}/MatMul"))
        if add is not None and bias is not None:
            nodes.append(helper.make_node("Add", [result, cut(bias)], [output], name=f"{base}/Add"))
    return nodes


def _cut(model: ModelProto, tensor: TensorProto, index: int, count: int) -> str:
    """The name of one of ``count`` equal parts of a constant along its last axis; its bytes are cut, whatever its type."""
    shape = list(tensor.dims)
    width = numpy_helper.to_array(tensor).dtype.itemsize
    raw = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
    values = np.frombuffer(raw, np.dtype(f"V{width}")).reshape(shape)
    part = np.ascontiguousarray(np.split(values, count, axis=-1)[index])
    name = f"{tensor.name}.part{index}"
    model.graph.initializer.append(
        TensorProto(name=name, data_type=tensor.data_type, dims=part.shape, raw_data=part.tobytes())
    )
    return name
