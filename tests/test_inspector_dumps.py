"""The census on layers of public dumps of TensorRT's inspector, whole and unchanged: ``inspector_dumps.json``.

They are facts of networks of other people, taken as each ``source`` shows them. The networks are not this project's, so
the census reads each dump twice: unchanged, when it must say nothing of our blocks, and with its nodes renamed to ours.
"""

import json
import re
from pathlib import Path

import pytest

from phreg_deploy.export.engine.findings import UNKNOWN, judge_census
from phreg_deploy.export.engine.inspection import parse_layers, take_census
from tests.test_inspector import manifest  # noqa: F401 (a fixture)

DUMPS = {
    f"{dump['gpu']}, {dump['tensorrt']}": dump
    for dump in json.loads((Path(__file__).parent / "inspector_dumps.json").read_text())
}


KINDS = ("fused_attention", "unfused_attention", "eight_bit", "float_linear")
ATTENTION, FC1, FC2 = "blocks.0.attn", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
# Dump -> its nodes under our names (patterns), and what the census says of them, in the order of ``KINDS``.
OURS = {
    "A100, 10.10": (
        {
            r"/encoder/layers\.(\d)/mha/attn/mha_prob/(MatMul|Softmax)": r"blocks.\1.attn/\2",
            r"/encoder/layers\.(\d)/mha/attn/MatMul": r"blocks.\1.attn/MatMul_1",
            r"/encoder/layers\.(\d)/mha/attn/(?:mha_prob/)?(q|k|v)(?:uery|ey|alue)/": r"blocks.\1.attn.qkv.\2/",
            r"/encoder/layers\.(\d)/mha/output/dense/": r"blocks.\1.attn.proj/",
            r"/encoder/layers\.(\d)/pos_ff/output/": r"blocks.\1.mlp.fc2/",
        },
        ({"blocks.3.attn", "blocks.8.attn"}, set(), set(), {"blocks.3.attn.proj", "blocks.2.attn.qkv", FC2}),
    ),
    "A100, 10.10, layer names only": ({"/match_model/Squeeze": f"{FC2}/MatMul"}, (set(), set(), set(), set())),
    "A100-SXM4-40GB, 9.2": (
        {r"\[MATRIX_MULTIPLY\]_\[scaled_dot_product_attention\]_\[x11_qkv\]_matrix_multiply": f"{ATTENTION}/MatMul_1"},
        (set(), {ATTENTION}, set(), set()),
    ),
    "Jetson Orin Nano, 10.1": ({"/classifier/1/addmm_mm": f"{FC1}/MatMul"}, (set(), set(), set(), {FC1})),
    "GeForce RTX 3060 Laptop, 10, November 2024": (
        {r"/classifier/classifier\.1/Gemm": f"{FC1}/MatMul", r"/classifier/classifier\.6/Gemm": f"{FC2}/MatMul"},
        (set(), set(), set(), {FC1, FC2}),
    ),
    "GeForce RTX 3090, 8": (
        {
            "resnet50/quant_predictions/MatMul": f"{FC1}/MatMul",
            "resnet50/quant_predictions/Softmax": f"{ATTENTION}/Softmax",
        },
        (set(), {ATTENTION}, {FC1}, set()),
    ),
    "A100, 8, INT8": ({"Gemm_257": f"{FC1}/MatMul"}, (set(), set(), {FC1}, set())),
    "A100, 8, FP16": ({"Gemm_48": f"{FC1}/MatMul"}, (set(), set(), set(), {FC1})),
    "unknown, SM 8 or later, 10.8": (
        {"matMul1": f"{ATTENTION}/MatMul", "matMul2": f"{ATTENTION}/MatMul_1"},
        (set(), {ATTENTION}, set(), set()),
    ),
    # A product with a vector is a kernel of sums, which names no node: it is no product to the census.
    "unknown, 10.12 or later": ({"linear2": f"{FC2}/MatMul"}, (set(), set(), set(), set())),
}


def census(dump, names=None, kinds=None):
    """Take the census of a dump; ``names``: patterns to replace in it; ``kinds``: of layers that alone count."""
    layers = [la for la in dump["layers"] if kinds is None or (isinstance(la, dict) and la.get("LayerType") in kinds)]
    text = json.dumps({"Layers": layers, "Bindings": []})
    for pattern, ours in (names or {}).items():
        text = re.sub(pattern, ours, text)
    return take_census(parse_layers(text))


def test_every_dump_names_its_source_and_has_an_expectation():
    assert set(DUMPS) == set(OURS)
    assert all(dump["source"].startswith("https://github.com/") for dump in DUMPS.values())
    assert len({dump["gpu"] for dump in DUMPS.values() if "unknown" not in dump["gpu"]}) >= 4


@pytest.mark.parametrize("name", DUMPS)
def test_of_another_network_nothing_is_said(name, manifest):  # noqa: F811
    taken = census(DUMPS[name])
    assert [getattr(taken, kind) for kind in KINDS] == [()] * 4
    assert taken.unnamed_fused == 0
    assert {finding.verdict for finding in judge_census(taken, manifest("fp16"), ["blocks.0.mlp.fc1"])} == {UNKNOWN}


@pytest.mark.parametrize("name", DUMPS)
def test_under_our_names_each_layer_is_what_it_is(name):
    names, expected = OURS[name]
    taken = census(DUMPS[name], names)
    assert tuple(set(getattr(taken, kind)) for kind in KINDS) == expected
    assert taken.layers == len(DUMPS[name]["layers"])


@pytest.mark.parametrize("name", DUMPS)
def test_layers_that_only_move_data_are_no_products(name):
    """They name the product that they move data for, and may read its input in another type."""
    taken = census(DUMPS[name], OURS[name][0], kinds=("NoOp", "Reformat"))
    assert (taken.eight_bit, taken.float_linear) == ((), ())
