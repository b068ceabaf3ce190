"""INT8 graphs of every family: their linear layers, exact folding, the places of Q/DQ, and the gain of rounding."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.calibration import gptq as rounding
from phreg_deploy.calibration import ranges as ranges_module
from phreg_deploy.calibration.kernels import open_counted
from phreg_deploy.errors import PhregError
from phreg_deploy.onnx_graph.linears import find_linears
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.quantisation import Smoothing, quantise_weight
from tests.cli_helpers import photograph
from tests.quantised_graphs import features, traced
from tests.small_models import FAMILIES, VARIANTS

EVERY = [*FAMILIES, *VARIANTS]
# Families whose second layer of an attention or an MLP has another input than the attention's values or hidden units.
LAST = {
    ("normed", "proj"): "norm",
    ("normed", "fc2"): "norm",
    ("eva02-base", "fc2"): "norm",
    ("gated", "proj"): "hidden",
}
EXACT = [Smoothing(), Smoothing(None, None, None), Smoothing(0.3, None, 1.0, registers=False)]


def initialisers(graph):
    return {i.name: i for i in graph.graph.initializer}


def expected_layers(family):
    """Map each linear layer to (kind of its input, multiply-accumulates per token), from the timm model."""
    layers, fused = {}, {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv"}
    for name, layer in traced(family).model.blocks.named_modules(prefix="blocks"):
        if isinstance(layer, nn.Linear):
            path, last = name.rsplit(".", 1)
            kind = LAST.get((family, last), {"proj": "value", "fc2": "hidden"}.get(last, "norm"))
            full = f"{path}.{fused.get(last, last)}"
            size = layer.weight.numel()
            if last in ("k_proj", "v_proj"):
                size = layer.in_features * layer.in_features  # keys and values that heads share are repeated
            layers[full] = (kind, layers.get(full, ("", 0))[1] + size)
    return layers


@pytest.mark.parametrize("family", EVERY)
def test_every_linear_layer_is_found_with_what_feeds_it(family):
    here = traced(family)
    assert {n.name: (n.kind, n.size) for n in here.linears} == expected_layers(family)
    for n in here.linears:
        assert (n.feeder, n.columns) == (n.name.replace("proj", "qkv"), (96, 144)) or n.kind != "value"
        assert (n.add is None) == (n.bias is None)


@pytest.mark.parametrize("family", EVERY)
def test_folding_alone_changes_nothing(family):
    here = traced(family)
    plain = features(open_session(here.graph), here.images[0])
    settings = EXACT if family in ("augreg", "bare", "eva02-base") else EXACT[:1]
    for smoothing in settings:
        graph = here.eight_bits("cpu", frozenset(here.names), smoothing)
        assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.graph.node}
        folded = features(open_session(graph), here.images[0])
        assert np.linalg.norm(folded - plain) / np.linalg.norm(plain) < 1e-4


@pytest.mark.parametrize("target", ["cpu", "trt"])
@pytest.mark.parametrize("family", EVERY)
def test_quantize_dequantize_pairs_surround_weight_products_alone(family, target):
    here = traced(family)
    graph, zeros = here.eight_bits(target), set()
    onnx.checker.check_model(graph)
    constants = initialisers(graph)
    readers = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    products = {f"{name}/MatMul" for name in here.names}
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear":
            (reader,) = readers[node.output[0]]
            assert (reader.op_type, reader.name in products) == ("MatMul", True), "one pair, one product"
        if node.op_type == "QuantizeLinear":
            assert {r.op_type for r in readers[node.output[0]]} == {"DequantizeLinear"}
            zeros.add((constants[node.input[2]].data_type, onnx.numpy_helper.to_array(constants[node.input[2]]).item()))
    for name in here.names:
        weight = onnx.numpy_helper.to_array(constants[f"{name}.int8"])
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() == 127
        if f"{name}.bias_folded" in constants:
            assert list(constants[f"{name}.bias_folded"].dims) == [1, 1, weight.shape[1]]
    signed = {(TensorProto.INT8, 0)}
    assert zeros == signed if target == "trt" else signed <= zeros or {kind for kind, _ in zeros} == {TensorProto.UINT8}
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("DequantizeLinear") == 2 * len(here.names)


@pytest.mark.parametrize("family", EVERY)
def test_both_targets_run_in_integer_kernels_and_agree(family):
    here = traced(family)
    plain = features(open_session(here.graph), here.images[0])
    answers = {}
    for target in ("cpu", "trt"):
        session, census = open_counted(here.eight_bits(target), here.names)
        assert sorted(census.integer) == sorted(here.names)
        answers[target] = features(session, here.images[0])
    assert agreement(answers["cpu"], plain).p1 > 0.999
    # for TensorRT, steps are rounded up to what FP16 holds; .99969 for eva02-base since hidden units have headroom
    assert agreement(answers["trt"], answers["cpu"]).minimum > 0.9996


def test_a_layer_that_is_kept_stays_float_and_the_others_do_not():
    here, layer = traced("dinov2"), "blocks.1.mlp.fc2"
    graph = here.eight_bits("cpu", frozenset({layer}))
    constants = initialisers(graph)
    assert f"{layer}.int8" not in constants
    assert list(constants[f"{layer}.bias_folded"].dims) == [48]
    session, census = open_counted(graph, [n for n in here.names if n != layer])
    assert len(census.integer) == len(here.names) - 1
    assert agreement(features(session, here.images[0]), features(open_session(here.graph), here.images[0])).p1 > 0.999
    with pytest.raises(PhregError, match=rf"1 of 8 .* {layer}: its 8-bit weights are gone"):
        open_counted(graph, here.names)


def open_with_outputs(graph, sources):
    """Open a session of the graph with the tensors ``sources`` as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.graph.output.extend(helper.make_tensor_value_info(s, TensorProto.FLOAT, None) for s in sources)
    return open_session(copy)


@pytest.mark.parametrize("family", ["augreg", "siglip", "eva02-base"])
def test_streamed_ranges_are_those_of_the_tensors(family):
    here = traced(family)
    sources = sorted({n.source for n in here.linears})
    session = open_with_outputs(here.graph, sources)
    batches = [session.run(sources, feed) for feed, _ in here.feeds]
    first = int(here.model.cls_token is not None)
    assert here.model.num_prefix_tokens == first + 4
    for i, source in enumerate(sources):
        rows = np.concatenate([values[i] for values in batches])  # (B, T, C)
        others = np.concatenate([rows[:, :first], rows[:, first + 4 :]], axis=1)
        for part, values in (("all", rows), ("others", others)):
            np.testing.assert_array_equal(here.ranges[source][part].low, values.min((0, 1)))
            np.testing.assert_array_equal(here.ranges[source][part].high, values.max((0, 1)))
    assert any(not np.array_equal(r["all"].high, r["others"].high) for r in here.ranges.values())


def test_register_rows_are_left_out_of_hidden_ranges_alone():
    here = traced("augreg")
    included, left_out = (here.equalised(Smoothing(registers=r)).grids for r in (True, False))
    differs = {n.kind for n in here.linears if included[n.name].step != left_out[n.name].step}
    assert differs == {"hidden"}


def test_ranges_without_images_are_refused():
    here = traced("augreg")
    with pytest.raises(PhregError, match="no image"):
        ranges_module.observe_ranges(here.graph, here.linears, here.spec, [], lambda _count: None)


def test_moments_are_those_of_the_rounded_inputs():
    here = traced("dinov2")
    source = here.linears[3].source
    sources = {n.source: here.equalised().weights[n.name].shape[0] for n in here.linears}
    tokens = here.model.num_prefix_tokens + 16
    moments, advances = {}, []
    rounding.observe_moments(
        here.graph, sources, tokens, here.feeds, lambda *_: advances.append(1), moments.__setitem__
    )
    assert len(advances) == len(sources)
    grid = here.equalised().grids[here.linears[3].name]
    rows = np.concatenate([open_with_outputs(here.graph, [source]).run([source], feed)[0] for feed, _ in here.feeds])
    rows = ((rows.reshape(-1, rows.shape[-1]) - grid.centre) / grid.smooth).astype(np.float64)
    assert moments[source].rows == len(rows)
    expected = rows.T @ rows / len(rows) + np.eye(rows.shape[1]) * grid.step**2 / 12
    np.testing.assert_allclose(moments[source].centred(grid), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def correlated(rows=3000, channels=150, outputs=24, rank=12, seed=0):
    """Draw inputs of low rank with a little noise, like features, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, channels)) + 0.1 * rng.normal(size=(rows, channels))
    return x, rng.normal(size=(channels, outputs)).astype(np.float32)


def naive(weight, moments):
    """Round by GPTQ as in the paper's algorithm, without blocks."""
    damped = moments + np.eye(len(moments)) * rounding.DAMPING * np.trace(moments) / len(moments)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, (values, steps) = weight.astype(np.float64), quantise_weight(weight)
    for row in range(len(left)):
        values[row] = np.clip(np.round(left[row] / steps), -127, 127)
        left[row:] -= np.outer(factor[row, row:], (left[row] - values[row] * steps) / factor[row, row])
    return values


def test_rounding_on_images_loses_less_than_plain_rounding():
    x, weight = correlated()
    moments = x.T @ x / len(x)
    values, steps = rounding.round_weight(weight, moments)
    plain, plain_steps = quantise_weight(weight)
    assert values.dtype == np.int8
    assert np.abs(values.astype(int)).max() <= 127
    np.testing.assert_array_equal(steps, plain_steps)
    errors = [np.linalg.norm(x @ (v * steps - weight)) for v in (values, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert (values == naive(weight, moments)).mean() > 0.999, "blocks change the speed alone"


def test_rounding_is_plain_where_channels_have_nothing_to_do_with_each_other():
    _, weight = correlated(seed=1)
    values, _ = rounding.round_weight(weight, np.diag(np.linspace(0.1, 9, len(weight))))
    np.testing.assert_array_equal(values, quantise_weight(weight)[0])


@pytest.mark.parametrize(
    "moments",
    [
        -np.eye(150),
        np.eye(150) - 2 * np.ones((150, 150)) / 10,
        np.full((150, 150), np.nan),
    ],
)
def test_rounding_falls_back_where_moments_cannot_be_inverted(moments):
    _, weight = correlated()
    values, steps = rounding.round_weight(weight, moments)
    np.testing.assert_array_equal(values, quantise_weight(weight)[0])
    assert np.isfinite(steps).all()


def test_an_input_that_is_always_zero_is_rounded_plainly():
    _, weight = correlated()
    values, _ = rounding.round_weight(weight, np.zeros((150, 150)))
    np.testing.assert_array_equal(values, quantise_weight(weight)[0])


def test_a_graph_without_names_is_refused():
    copy = onnx.ModelProto()
    copy.CopyFrom(traced("augreg").graph)
    for i, node in enumerate(copy.graph.node):
        node.name = f"node_{i}"
    with pytest.raises(PhregError, match=r"names no blocks.*older version\. Export it again"):
        find_linears(copy)


DOOR = """
import sys
for name in ("onnx", "onnxruntime", "ml_dtypes"):
    sys.modules[name] = None
from pathlib import Path
from phreg_deploy.calibration import calibrate
from phreg_deploy.errors import BackendMissing
folder = Path(sys.argv[1])
try:
    calibrate(folder, folder, folder / "out")
except BackendMissing as error:
    print(error)
"""


def test_calibrate_is_imported_without_onnx_and_its_call_names_what_is_missing(tmp_path):
    photograph(0, 64, 64).save(tmp_path / "0.png")
    done = subprocess.run([sys.executable, "-c", DOOR, tmp_path], capture_output=True, text=True, check=False)
    modules = "'ml_dtypes', 'onnx', 'onnxruntime'"
    assert done.stdout.startswith(f"phreg_deploy.calibration needs the modules {modules}, which are"), done.stderr
    assert 'pip install "phreg-deploy[calibration]"' in done.stdout
