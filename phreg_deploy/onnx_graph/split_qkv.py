"""Split a fused qkv projection in 8 bits into three products, because TensorRT computes a fused one in float.

TensorRT's compiler cuts a fused projection at the Split after it. In FP16 it joins the parts again and nothing is lost.
In 8 bits it cuts the *dequantised* weight at every inference and computes in float (seen in plans of TensorRT-RTX 1.7).
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from phreg_deploy.onnx_graph.wiring import Wiring, replace_nodes


def split_projections(model: ModelProto) -> ModelProto:
    """Split, in place, every 8-bit product that feeds a Split, directly or through a bias, with the same numbers."""
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
        base = f"{product.name.removesuffix('/MatMul')}.{'qkv'[i] if count == 3 else i}"
        operands = [_cut(model, wiring.constants[name], i, count) for name in weight.input]
        name = f"{base}/weight/DequantizeLinear"
        nodes.append(helper.make_node("DequantizeLinear", operands, [f"{base}/weight"], name=name, axis=1))
        result = output if add is None else f"{base}/product"
        nodes.append(helper.make_node("MatMul", [product.input[0], f"{base}/weight"], [result], name=f"{base}/MatMul"))
        if add is not None and bias is not None:
            inputs = [result, _cut(model, wiring.constants[bias], i, count)]
            nodes.append(helper.make_node("Add", inputs, [output], name=f"{base}/Add"))
    return nodes


def _cut(model: ModelProto, tensor: TensorProto, index: int, count: int) -> str:
    """Add one of ``count`` equal parts of a constant, cut along its last axis, to the graph, and return its name."""
    shape = list(tensor.dims)
    width = numpy_helper.to_array(tensor).dtype.itemsize
    raw = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
    # Cut the bytes: numpy has no FP8 and no bfloat16.
    values = np.frombuffer(raw, np.dtype(f"V{width}")).reshape(shape)
    part = np.ascontiguousarray(np.split(values, count, axis=-1)[index])
    name = f"{tensor.name}.part{index}"
    cut = TensorProto(name=name, data_type=tensor.data_type, dims=part.shape, raw_data=part.tobytes())
    model.graph.initializer.append(cut)
    return name
