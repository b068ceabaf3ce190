"""Graphs whose 8-bit layers ONNX Runtime leaves in float: each is an error that names the layer and the reason."""

import copy

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from phreg_deploy.calibration.kernels import count, open_counted
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.session import open_session
from tests.quantised_graphs import features, traced

# Its input comes from a layer norm: signed 8 bits.
LAYER = "blocks.1.attn.qkv"
# Its input is hidden units: unsigned 8 bits with a zero point.
UNIT = "blocks.1.mlp.fc2"


@pytest.fixture
def here():
    return traced("augreg")


def constant(graph, name, value):
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def flatten_biases(model, *layers):
    """Give the biases of ``layers`` one axis, as exporters do."""
    edited = copy.deepcopy(model)
    for tensor in edited.graph.initializer:
        if tensor.name in {f"{layer}.bias_folded" for layer in layers}:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(-1), tensor.name))
    return edited


def split_layer(model, layer, own):
    """Split ``layer`` into two products, over the first and the second half of its outputs, as separate q, k and v are.

    Args:
        own: the second product's input has a QuantizeLinear and a DequantizeLinear of its own, with a step that differs
            in the last place; otherwise one DequantizeLinear feeds both.
    """
    edited = copy.deepcopy(model)
    graph, nodes = edited.graph, []
    value = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producer = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.name != f"{layer}/MatMul":
            nodes.append(node)
            continue
        middle, outputs = value[f"{layer}.int8"].shape[1] // 2, []
        for i, half in enumerate((slice(None, middle), slice(middle, None))):
            name, source = f"{layer}.{i}", node.input[0]
            operands = [
                constant(graph, f"{name}.int8", value[f"{layer}.int8"][:, half]),
                constant(graph, f"{name}.weight_step", value[f"{layer}.weight_step"][half]),
                constant(graph, f"{name}.weight_zero", np.zeros(middle, np.int8)),
            ]
            nodes.append(helper.make_node("DequantizeLinear", operands, [f"{name}/weight"], axis=1))
            if own and i:
                quantised, step, zero = producer[source].input
                step = constant(graph, f"{name}.step", np.nextafter(value[step], np.float32(np.inf)))
                before = producer[quantised].input[0]
                nodes.append(helper.make_node("QuantizeLinear", [before, step, zero], [f"{name}/quantised"]))
                source = f"{name}/input"
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}/quantised", step, zero], [source]))
            nodes.append(helper.make_node("MatMul", [source, f"{name}/weight"], [f"{name}/product"]))
            outputs.append(f"{name}/product")
        nodes.append(helper.make_node("Concat", outputs, [node.output[0]], axis=-1))
    del graph.node[:]
    graph.node.extend(nodes)
    return edited


def halves_of(here, layer):
    return [*(n for n in here.names if n != layer), f"{layer}.0", f"{layer}.1"]


def test_a_bias_of_one_axis_is_reported(here):
    graph = flatten_biases(here.eight_bits("cpu"), "blocks.1.mlp.fc1")
    with pytest.raises(PhregError) as error:
        open_counted(graph, here.names)
    message = str(error.value)
    assert message.startswith("census: 1 of 8 linear layers that were meant to run in 8 bits run in float")
    reason = "DequantizeLinear -> Gemm: MatMulAddFusion took the Add for a 1-D bias; it must be [1, 1, O]"
    assert f"blocks.1.mlp.fc1: {reason}" in message


def test_every_layer_in_float_is_counted(here):
    with pytest.raises(PhregError, match=r"census: 8 of 8 .* e\.g\. blocks\.0\.attn\.qkv: "):
        open_counted(flatten_biases(here.eight_bits("trt"), *here.names), here.names)


def test_one_signed_input_of_two_products_is_reported(here):
    model = here.eight_bits("cpu")
    session, census = open_counted(split_layer(model, LAYER, own=True), halves_of(here, LAYER))
    assert {f"{LAYER}.0", f"{LAYER}.1"} < set(census.integer)
    whole = features(open_session(model), here.images[0])
    np.testing.assert_allclose(features(session, here.images[0]), whole, atol=2e-2 * np.abs(whole).max())
    with pytest.raises(PhregError, match=rf"census: 2 of 9 .* {LAYER}\.0: DequantizeLinear -> MatMul"):
        open_counted(split_layer(model, LAYER, own=False), halves_of(here, LAYER))


def test_the_reason_names_the_shared_input(here):
    with pytest.raises(PhregError, match=r"feeds 2"):
        open_counted(split_layer(here.eight_bits("cpu"), LAYER, own=False), halves_of(here, LAYER))


@pytest.mark.parametrize("own", [True, False])
def test_an_input_with_a_zero_point_may_be_shared(here, own):
    """Unsigned inputs stay in integer kernels either way."""
    _, census = open_counted(split_layer(here.eight_bits("cpu"), UNIT, own), halves_of(here, UNIT))
    assert len(census.integer) == 9


def test_missing_weights_are_reported(here):
    with pytest.raises(PhregError, match=r"8 of 8 .* blocks\.0\.attn\.qkv: its 8-bit weights are gone"):
        open_counted(here.graph, here.names)


def test_no_expected_layer_is_no_error(here):
    session, census = open_counted(here.graph, [])
    assert (census.integer, census.floats) == ([], {})
    assert features(session, here.images[0]).shape == (4, 16, 48)


def test_a_graph_that_was_not_optimized_has_no_integer_kernel(here):
    census = count(here.eight_bits("cpu"), here.names)
    assert census.integer == []
    assert list(census.floats) == here.names


def test_a_graph_that_the_runtime_refuses_is_a_phreg_error(here):
    broken = onnx.ModelProto()
    broken.CopyFrom(here.graph)
    broken.graph.node[5].op_type = "NoSuchOperator"
    with pytest.raises(
        PhregError, match=r"calibrate: ONNX Runtime .* cannot load the graph: .*NoSuchOperator"
    ) as error:
        open_counted(broken, [])
    assert "\n" not in str(error.value)
