"""FP16 and BF16 graphs: the nodes that stay in FP32, the Casts, and the outputs."""

import re

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.trace import trace
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.onnx_graph.mixed_precision import LIMITS, ROOM, float_tensors, islands, narrow
from phreg_deploy.spec import Batches, Sizes
from tests.small_models import small

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
IMAGES = np.random.default_rng(3).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def traced(torch):
    """A traced model with the largest magnitudes of its tensors."""
    model = small("augreg")
    graph = trace(DenseViT(model, model_preprocess(model)), Sizes("fixed", ((64, 64),)), Batches.parse("1"))
    graph.observe(torch.from_numpy(IMAGES))
    return graph


@pytest.fixture(scope="module", name="torch")
def _torch():
    return torch


def copy_of(traced):
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    return model


def tensor_types(model):
    """Map each tensor to its type by onnx's strict inference, which fails if an operator has inputs of two types."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    }
    return kinds | {i.name: i.data_type for i in model.graph.initializer}


def run_graph(model):
    options = onnxruntime.SessionOptions()
    # Optimized, ONNX Runtime would skip roundings to FP16.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": IMAGES})))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_product_and_norm_is_in_the_format_and_the_graph_is_well_typed(traced, precision):
    model = narrow(copy_of(traced), precision, traced.largest).model
    kinds = tensor_types(model)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Softmax", "Gelu") or node.name.startswith("blocks."):
            assert kinds[node.output[0]] == LOW[precision], node.name
    outputs = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert outputs["token_norm"] == TensorProto.FLOAT
    assert outputs["features"] == (TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT)


@pytest.mark.parametrize(("precision", "casts"), [("fp16", ["FLOAT16"]), ("bf16", ["FLOAT", "BFLOAT16"])])
def test_bytes_become_floats_by_a_cast_that_every_document_allows(traced, precision, casts):
    """NvInferRuntimeBase.h: "kUINT8 conversions are only supported for {kFLOAT, kHALF}"."""
    model = narrow(copy_of(traced), precision, traced.largest).model
    found, tensor = [], "image"
    while len(readers := [node for node in model.graph.node if tensor in node.input]) == 1:
        if readers[0].op_type != "Cast":
            break
        found.append(TensorProto.DataType.Name(readers[0].attribute[0].i))
        tensor = readers[0].output[0]
    assert found == casts
    every = np.arange(256).astype(ml_dtypes.bfloat16)
    assert np.array_equal(every.astype(int), np.arange(256)), "bfloat16 holds every byte"


def test_a_tensor_beyond_the_range_keeps_what_touches_it_in_fp32_and_nothing_else(traced):
    hidden = next(n for n in traced.model.graph.node if n.name == "blocks.1.mlp.act/Gelu").output[0]
    largest = {**traced.largest, hidden: LIMITS["fp16"] / ROOM * 1.01}
    narrowed = narrow(copy_of(traced), "fp16", largest)
    assert set(narrowed.islands) == {"blocks.1.mlp.act/Gelu", "blocks.1.mlp.fc2/MatMul"}
    assert hidden in narrowed.islands["blocks.1.mlp.act/Gelu"]
    kinds = tensor_types(narrowed.model)
    assert kinds[hidden] == TensorProto.FLOAT
    assert any("blocks.1.mlp.fc2" in line for line in islands(narrowed, "fp16"))
    assert narrow(copy_of(traced), "bf16", largest).islands == {}, "BF16 has FP32's range"


def test_a_value_just_within_the_range_keeps_nothing_in_fp32(traced):
    hidden = next(n for n in traced.model.graph.node if n.name == "blocks.1.mlp.act/Gelu").output[0]
    assert narrow(copy_of(traced), "fp16", {**traced.largest, hidden: LIMITS["fp16"] / ROOM * 0.99}).islands == {}


def test_an_overflow_that_would_be_infinite_is_computed_in_fp32():
    """A hidden unit of 1e5 is infinite in FP16; it adds little, so only its own half-block is computed in FP32."""
    model = small("augreg")
    with torch.no_grad():
        signs = torch.tensor([1.0, -1.0]).repeat(24)  # a layer norm's outputs add up to nothing
        model.blocks[1].mlp.fc1.weight[:2] = 1.6e4 * torch.stack([signs, -signs])  # times 48 normalised inputs
        model.blocks[1].mlp.fc2.weight[:, :2] = 1e-6
    graph = trace(DenseViT(model, model_preprocess(model)), Sizes("fixed", ((64, 64),)), Batches.parse("1"))
    graph.observe(torch.from_numpy(IMAGES))
    expected = run_graph(copy_of(graph))["features"].reshape(1, -1, 48)
    blind = narrow(copy_of(graph), "fp16").model
    hidden = next(n for n in blind.graph.node if n.name == "blocks.1.mlp.fc1/Add").output[0]
    # As an output, the tensor is really rounded to FP16.
    blind.graph.output.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT16, None))
    assert np.isinf(run_graph(blind)[hidden]).any(), (
        "without ranges the same graph overflows, or this test shows nothing"
    )
    got = run_graph(narrow(copy_of(graph), "fp16", graph.largest).model)["features"].reshape(1, -1, 48)
    assert agreement(got.astype(np.float32), expected).p1 > 0.9999


@pytest.mark.parametrize("pattern", ["blocks.0.attn", r"^blocks\.\d+/Add"])
def test_layers_that_a_user_keeps_stay_in_fp32(traced, pattern):
    narrowed = narrow(copy_of(traced), "fp16", traced.largest, [pattern])
    kinds = tensor_types(narrowed.model)
    matching = [n for n in narrowed.model.graph.node if re.search(pattern, n.name)]
    assert matching
    assert all(kinds[n.output[0]] == TensorProto.FLOAT for n in matching)
    assert all(n.name in narrowed.islands for n in matching)


@pytest.mark.parametrize(
    ("pattern", "words"), [("blocks.99.mlp", "fits no node"), ("blocks.(", "no regular expression")]
)
def test_a_pattern_that_matches_nothing_is_reported(traced, pattern, words):
    with pytest.raises(PhregError, match=re.escape(words)):
        narrow(copy_of(traced), "fp16", traced.largest, [pattern])


def test_an_unknown_precision_is_refused(traced):
    with pytest.raises(PhregError, match="expected fp16 or bf16"):
        narrow(copy_of(traced), "fp64")


def test_every_name_that_torch_watched_and_more_has_a_range(traced):
    """Products before their bias have no name in torch; an infinite one would still be found."""
    products = [n.output[0] for n in traced.model.graph.node if n.op_type == "MatMul" and n.name.startswith("blocks.")]
    assert set(products) - set(traced.largest), "torch names them all now: the rule for Add can go"
    add = next(n for n in traced.model.graph.node if n.name == "blocks.0.mlp.fc1/Add")
    huge = {**traced.largest, add.output[0]: 1e6}
    assert "blocks.0.mlp.fc1/MatMul" in narrow(copy_of(traced), "fp16", huge).islands


def test_quantised_inputs_take_the_type_of_what_feeds_and_of_what_reads_them():
    """Q takes FP32 after a node in FP32, DQ gives FP16 to a product, and no Cast is between the two."""
    values = {"step": np.float32(0.5), "zero": np.int8(0), "w8": np.ones((4, 3), np.int8), "wstep": np.float32(0.25)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], name="wide/Gelu"),
        helper.make_node("QuantizeLinear", ["g", "step", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w8", "wstep", "zero"], ["w"], name="w"),
        helper.make_node("MatMul", ["d", "w"], ["features"], name="p/MatMul"),
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    output = helper.make_tensor_value_info("features", TensorProto.FLOAT, [2, 3])
    graph = helper.make_graph(nodes, "g", [source], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    kinds = tensor_types(narrow(model, "fp16", {"g": 1e6}).model)
    assert kinds["g"] == TensorProto.FLOAT
    assert kinds["q"] == TensorProto.INT8
    assert kinds["d"] == kinds["w"] == kinds["features"] == TensorProto.FLOAT16
    order = [n.op_type for n in model.graph.node]
    assert order.count("Cast") == 0, order


def test_float_tensors_are_those_of_float_types(traced):
    names = float_tensors(traced.model)
    assert {"features", "token_norm", "blocks.0.attn.qkv.weight"} <= names
    assert "image" not in names
