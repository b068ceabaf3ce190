"""NVIDIA's parser and builder accept every family's graph, fuse its attention, and keep its 8-bit layers in 8 bits.

TensorRT for RTX 1.7 replaces TensorRT 11, on a machine without a GPU. The tests cover how NVIDIA's compiler treats the
graph, and neither speed nor outputs.
"""

import functools

import numpy as np
import onnx
import pytest

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine.inspection import take_census
from phreg_deploy.layers import Layers
from phreg_deploy.onnx_graph.heads import append_head
from phreg_deploy.onnx_graph.wiring import keep_outputs
from phreg_deploy.readout import Readout
from tests import nvidia
from tests.small_models import FAMILIES
from tests.trt_graphs import DEPTH, HEADS, PRECISIONS, SAME, SIDE, WIDTH, Graphs, build, graphs


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Skip before anything is traced if the bindings, the shim under them or TensorRT for RTX are missing."""
    nvidia.bindings(nvidia.NEWEST)
    nvidia.rtx_libraries()
    nvidia.shims(nvidia.NEWEST.partition(".")[0])


# By family, so that each of several workers traces families of its own.
CELLS = [(family, sizes, precision) for family in FAMILIES for sizes in ("fixed", "range") for precision in PRECISIONS]


@pytest.fixture(scope="module")
def plans_of(tmp_path_factory):
    """Build the plans of a family for some sizes, in all precisions: precision -> its graph, and the plan's steps or an
    error.
    """

    @functools.cache
    def plans(family, sizes):
        here, written, results = graphs(family, sizes), {}, {}
        for precision in PRECISIONS:
            try:
                graph = here.write(precision)
                onnx.checker.check_model(graph)
                written[precision] = (graph, here.profiles)
            except PhregError as error:
                results[precision] = (None, error)
        built = build(written, tmp_path_factory.mktemp("plans"))
        return {**results, **{precision: (written[precision][0], steps) for precision, steps in built.items()}}

    return plans


def int8_layers(graph):
    """Return the linear layers whose weight the graph stores in 8 bits; for split projections, their parts."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in makers]
    return {
        node.name.removesuffix("/MatMul")
        for node in products
        if makers[node.input[1]].op_type == "DequantizeLinear"
        and makers[node.input[1]].name.endswith("/weight/DequantizeLinear")
    }


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_the_plan_has_the_expected_kernels(plans_of, cell):
    family, sizes, precision = cell
    graph, steps = plans_of(SAME.get(family, family), sizes)[precision]
    if isinstance(steps, PhregError):
        raise steps
    assert not isinstance(steps, str), steps
    census = nvidia.census(steps)
    # A plan has every kernel once per profile.
    times = len(graphs(SAME.get(family, family), sizes).profiles)
    linears = {linear.name for linear in graphs(SAME.get(family, family), sizes).linears}
    attentions = {f"blocks.{i}.attn" for i in range(DEPTH)}
    if precision == "fp32":  # NVIDIA fuses no attention in FP32
        assert census == nvidia.Census(0, 0, frozenset(), frozenset(linears | attentions | {"dense"}))
    elif precision in ("fp16", "bf16"):
        assert census == nvidia.Census(times * DEPTH, 0, frozenset(), frozenset(linears | {"dense"}))
    else:
        expected = int8_layers(graph)
        assert {name if name in linears else name.rpartition(".")[0] for name in expected} == linears
        assert census == nvidia.Census(
            times * DEPTH, times * DEPTH if precision == "fp8" else 0, frozenset(expected), frozenset({"dense"})
        )


def steps_of(graph, here, folder):
    (steps,) = build({"": (graph, here.profiles)}, folder).values()
    return steps


def describe_layers(steps):
    """Describe the steps of a plan as TensorRT's engine inspector does, as far as ``take_census`` reads it."""

    def layer(step):
        kind = "gemm" if step.kind in ("fully_connected", "runtime_fusion") else "kgen"
        eight = any(node.endswith("DequantizeLinear") for node in step.nodes)
        nodes = "\x1e".join(f"[ONNX Layer: {node}]" for node in step.nodes)
        return {
            "Name": step.kernel,
            "LayerType": kind,
            "Metadata": nodes,
            "Inputs": [{"Format/Datatype": "Int8" if eight else "Half"}],
        }

    return [layer(step) for step in steps]


@pytest.mark.parametrize(("sizes", "alone"), [("fixed", False), ("range", True)])
def test_heads_are_built_and_read_every_layer_as_before(sizes, alone, tmp_path):
    here = graphs("augreg", sizes)
    graph = here.write("fp16")
    rng = np.random.default_rng(0)
    patch = (here.patch, here.patch)
    for kind, method, stride in (("labels", "joint-bilateral", here.patch // 2), ("segmentation", "bilinear", 1)):
        served = ServedHead("", kind, method, stride, None, ("a", "b", "c"), None, None)
        weight = rng.standard_normal((3, WIDTH)).astype(np.float32)
        append_head(graph, served, weight, np.zeros(3, np.float32), inputs=("features",), patch=patch)
    if alone:
        keep_outputs(graph, {"labels", "segmentation", "token_norm"})
    onnx.checker.check_model(graph)
    steps = steps_of(graph, here, tmp_path)
    assert not isinstance(steps, str), steps
    census = nvidia.census(steps)
    assert census.fused_attention == len(here.profiles) * DEPTH


@pytest.mark.parametrize("family", ["augreg", "dinov2-giant", "eva02", "eva02-base"])
def test_the_census_names_layers_as_calibration_does(family, tmp_path):
    here = graphs(family)
    census = take_census(describe_layers(steps_of(here.write("int8"), here, tmp_path)))
    assert set(census.eight_bit) == {linear.name for linear in here.linears}
    assert set(census.fused_attention) == {f"blocks.{i}.attn" for i in range(DEPTH)}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_unsplit_projection_is_computed_in_floats(precision, tmp_path):
    """This is why projections are split. The census sees that they are not in 8 bits."""
    here = graphs("augreg")
    census = nvidia.census(steps_of(here.write(precision, split=False), here, tmp_path))
    fused = {f"blocks.{i}.attn.qkv" for i in range(DEPTH)}
    assert fused <= census.floats
    assert census.eight_bit == {linear.name for linear in here.linears} - fused


@pytest.mark.parametrize(("head", "fused"), [(8, 0), (16, DEPTH), (256, DEPTH), (264, 0)])
def test_attention_is_fused_for_the_supported_head_widths(head, fused, tmp_path):
    here = graphs("augreg", width=2 * head, heads=2)
    assert nvidia.census(steps_of(here.write("fp16"), here, tmp_path)).fused_attention == fused


@pytest.mark.parametrize(("precision", "fused"), [("fp16", DEPTH), ("int8", DEPTH), ("fp8", 0)])
def test_attention_in_fp8_is_fused_from_32_tokens_on(precision, fused, tmp_path):
    here = graphs("augreg", side=5)  # 1 + 4 + 25 tokens
    assert nvidia.census(steps_of(here.write(precision), here, tmp_path)).fused_attention == fused


@pytest.mark.parametrize("sizes", ["fixed", "range"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_further_outputs_leave_attention_fused_and_layers_in_8_bits(precision, sizes, tmp_path):
    here = Graphs("dinov2", sizes, WIDTH, HEADS, SIDE, layers=Layers((1, DEPTH), True), attention=True)
    graph = here.write(precision)
    onnx.checker.check_model(graph)
    assert {"features.1", "cls.1", "token_norm.1", "attention"} < {output.name for output in graph.graph.output}
    steps = steps_of(graph, here, tmp_path)
    assert not isinstance(steps, str), steps
    census, times = nvidia.census(steps), len(here.profiles)
    assert census.fused_attention == (0 if precision == "fp32" else times * DEPTH)
    assert census.eight_bit_attention == (times * DEPTH if precision == "fp8" else 0)
    if precision in ("int8", "fp8"):
        assert census.eight_bit == int8_layers(graph)
        assert not census.floats & {linear.name for linear in here.linears}


@pytest.mark.parametrize(
    ("name", "precision", "sizes"),
    [
        ("value", "int8", "fixed"),
        ("value", "fp16", "range"),
        ("neighbour", "int8", "range"),
        ("neighbour", "bf16", "fixed"),
    ],
)
def test_readouts_of_clip_are_built(name, precision, sizes, tmp_path):
    here = Graphs("clip-quickgelu", sizes, WIDTH, HEADS, SIDE, readout=Readout(name, project=True))
    graph = here.write(precision)
    onnx.checker.check_model(graph)
    steps = steps_of(graph, here, tmp_path)
    assert not isinstance(steps, str), steps
    census = nvidia.census(steps)
    # The last block of "value" has no attention.
    times = len(here.profiles)
    assert census.fused_attention >= times * (DEPTH - 1)
    if precision in ("int8", "fp8"):
        assert census.eight_bit == int8_layers(graph)
        assert {"blocks.1.attn.value", "blocks.1.attn.proj"} <= census.eight_bit


def test_attention_on_fewer_tokens_is_left_in_fp16_and_fused(tmp_path):
    here = graphs("augreg", side=5)
    census = nvidia.census(steps_of(here.write("fp8", tokens=30), here, tmp_path))
    assert (census.fused_attention, census.eight_bit_attention) == (DEPTH, 0)
    assert census.floats == {"dense"}


def test_what_the_parser_refuses_is_named(tmp_path):
    here = graphs("augreg")
    graph = here.write("fp16")
    node = next(node for node in graph.graph.node if node.name == "blocks.1.mlp.act/Gelu")
    node.op_type, node.domain = "Wrong", "nobody"
    refusal = steps_of(graph, here, tmp_path)
    assert isinstance(refusal, str)
    assert "blocks.1.mlp.act/Gelu" in refusal
