"""Graphs for TensorRT: FP8 grids, attention in 8 bits, the split projection, and scales that FP16 can hold."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.calibration.fp8 import E4M3, FP8, LARGEST, SOFTMAX_STEP, quantise_fp8, write_fp8
from phreg_deploy.calibration.gptq import round_weight
from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import observe_magnitudes
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.onnx_graph.split_qkv import split_projections
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import halves
from tests.quantised_graphs import features, traced

FAMILIES = ["augreg", "eva02-base", "gated", "dinov2-giant"]


def run_graph(model, images):
    return features(open_session(model, literal=True), images)


def largest_magnitudes(here):
    return observe_magnitudes(here.graph, [({"image": images}, len(images)) for images in here.images], lambda _: None)


def write_graph(here, mode):
    return (
        here.eight_bits("trt")
        if mode == "int8"
        else write_fp8(here.graph, here.linears, largest_magnitudes(here), set())
    )


def nodes_of_kind(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_grows_to_what_fp16_holds_and_never_shrinks(seed):
    steps = np.random.default_rng(seed).lognormal(-6, 3, 500).astype(np.float32)
    steps = steps[(steps > 1e-6) & (steps < 6e4)]
    held = halves(steps)
    assert np.array_equal(held, held.astype(np.float16).astype(np.float32))
    assert (held >= steps).all()
    assert (held <= steps * (1 + 2.0**-10) + 6e-8).all()


def test_fp8_weights_reach_448_in_every_channel_and_are_the_nearest_of_their_grid():
    weight = np.random.default_rng(0).normal(0, 0.05, (64, 24)).astype(np.float32)
    values, steps = quantise_fp8(weight)
    assert values.dtype == E4M3
    assert (np.abs(values.astype(np.float32)).max(axis=0) > 0.9 * LARGEST).all()
    grid = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    grid = grid[np.isfinite(grid)]
    nearest = np.abs((weight / steps)[..., None] - grid).min(axis=-1)
    np.testing.assert_allclose(np.abs(weight / steps - values.astype(np.float32)), nearest, atol=1e-6)


def test_gptq_on_the_fp8_grid_is_closer_in_output_than_plain_rounding():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 32)) @ rng.normal(size=(32, 32))
    weight = rng.normal(0, 0.1, (32, 16)).astype(np.float32)
    error = {}
    rounded = {"plain": quantise_fp8(weight), "gptq": round_weight(weight, inputs.T @ inputs / len(inputs), FP8)}
    for name, (values, steps) in rounded.items():
        error[name] = np.linalg.norm(inputs @ (values.astype(np.float64) * steps - weight))
    assert error["gptq"] < 0.9 * error["plain"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_serves_nearly_the_same_features(family):
    here = traced(family)
    plain = run_graph(here.graph, here.images[0])
    eight = write_fp8(here.graph, here.linears, largest_magnitudes(here), set())
    onnx.checker.check_model(eight)
    got = agreement(run_graph(eight, here.images[0]), plain)
    assert 0.98 < got.mean < 0.99999, "FP8 has three bits of mantissa: neither broken nor without effect"


def test_attention_has_the_pattern_that_tensorrt_fuses():
    """Q -> DQ -> product -> softmax -> Q(1/448) -> DQ -> product, every DQ read by its product alone."""
    here = traced("augreg")
    model = write_fp8(here.graph, here.linears, largest_magnitudes(here), set())
    wiring = Wiring(model)
    products = [
        n
        for n in nodes_of_kind(model, "MatMul")
        if not any("weight" in name for name in n.input) and ".attn/" in n.name
    ]
    assert len(products) == 2 * here.depth
    for product in products:
        for name in product.input:
            dequantise = wiring.producer[name]
            assert dequantise.op_type == "DequantizeLinear"
            quantise = wiring.producer[dequantise.input[0]]
            source = wiring.producer[quantise.input[0]]
            if source.op_type == "Softmax":
                assert wiring.value(quantise.input[1]) == pytest.approx(SOFTMAX_STEP, rel=1e-3)
            assert len(wiring.readers[name]) == 1


def test_attention_that_is_kept_is_left_alone_and_so_are_kept_layers():
    here = traced("augreg")
    keep = {"blocks.0.attn", "blocks.1.mlp.fc2"}
    model = write_fp8(here.graph, here.linears, largest_magnitudes(here), keep)
    producer = Wiring(model).producer
    inputs = {n.name: [producer[i].op_type for i in n.input if i in producer] for n in nodes_of_kind(model, "MatMul")}
    assert "DequantizeLinear" not in inputs["blocks.0.attn/MatMul"] + inputs["blocks.0.attn/MatMul_2"]
    assert inputs["blocks.1.attn/MatMul"] == ["DequantizeLinear"] * 2
    assert inputs["blocks.1.mlp.fc2/MatMul"] == ["Gelu"]
    assert inputs["blocks.1.mlp.fc1/MatMul"] == ["DequantizeLinear"] * 2


def test_a_tensor_without_a_range_is_reported():
    here = traced("augreg")
    with pytest.raises(PhregError, match="has no finite range"):
        write_fp8(here.graph, here.linears, {}, set())


@pytest.mark.parametrize("mode", ["int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_in_parts_gives_the_same_numbers(family, mode):
    here = traced(family)
    whole = write_graph(here, mode)
    before = run_graph(whole, here.images[0])
    splits = [n for n in nodes_of_kind(whole, "Split") if ".attn" in n.name and len(n.output) == 3]
    parts = split_projections(whole)
    onnx.checker.check_model(parts)
    assert not [n for n in nodes_of_kind(parts, "Split") if ".attn" in n.name and len(n.output) == 3]
    assert splits
    names = {n.name for n in nodes_of_kind(parts, "MatMul")}
    assert {f"blocks.{b}.attn.qkv.{part}/MatMul" for b in range(here.depth) for part in "qkv"} <= names
    np.testing.assert_allclose(run_graph(parts, here.images[0]), before, atol=1e-4)


def test_a_float_projection_is_left_whole():
    here = traced("augreg")
    before = len(here.graph.graph.node)
    assert len(split_projections(here.graph).graph.node) == before


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_narrowing_changes_no_scale(mode):
    """Every scale stays the same number, and no Cast stands between a DequantizeLinear and its product."""
    here = traced("augreg")
    model = write_graph(here, mode)
    scales = {
        n.name: Wiring(model).value(n.input[1]).astype(np.float64) for n in nodes_of_kind(model, "DequantizeLinear")
    }
    narrowed = narrow(model, "fp16", largest_magnitudes(here)).model
    wiring = Wiring(narrowed)
    for node in nodes_of_kind(narrowed, "DequantizeLinear"):
        assert np.array_equal(wiring.value(node.input[1]).astype(np.float64), scales[node.name]), node.name
        assert {reader.op_type for reader in wiring.readers[node.output[0]]} == {"MatMul"}


@pytest.mark.parametrize("mode", ["int8", "fp8"])
@pytest.mark.parametrize("keep", [[], ["blocks.1.mlp"]])
def test_a_scale_has_the_type_of_the_floats_beside_it(mode, keep):
    """TensorRT 10.16 builds no INT8 engine on Orin where an FP16 scale stands beside an FP32 result: issue 4832."""
    here = traced("augreg")
    model = narrow(write_graph(here, mode), "fp16", largest_magnitudes(here), keep).model
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    seen = set()
    for operator, floats in (("QuantizeLinear", "input"), ("DequantizeLinear", "output")):
        for node in nodes_of_kind(model, operator):
            assert kinds[node.input[1]] == kinds[getattr(node, floats)[0]], node.name
            seen.add(kinds[node.input[1]])
    assert (onnx.TensorProto.FLOAT in seen) == bool(keep)
    assert onnx.TensorProto.FLOAT16 in seen


def test_one_input_is_quantized_once_for_all_its_readers_with_share():
    here = traced("eva02-base")
    arguments = (here.graph, here.linears, here.equalised(), set(), "trt")
    counts = [len(nodes_of_kind(write_int8(*arguments, share=share), "QuantizeLinear")) for share in (False, True)]
    assert counts[0] == len(here.linears)
    assert counts[1] == len({linear.source for linear in here.linears}) < counts[0]
