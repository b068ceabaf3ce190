"""The census reads layers as public dumps of several GPUs and versions of TensorRT name them.

Names and types are those of the dumps; the blocks are of a model with three. No dump is of this project's graphs.
"""

import json
from pathlib import Path

import pytest

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.export.engine.findings import judge_census
from phreg_deploy.export.engine.inspection import parse_layers, take_census

DEPTH = 3
HALF, FLOAT, FP8 = "Half", "Float", "FP8"
LINEARS = [f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("attn.proj", "mlp.fc1", "mlp.fc2")]


def layer(name, kind, tactic="", nodes=(), types=(HALF,), between="", prefix="[ONNX Layer: "):
    return {
        "Name": name,
        "LayerType": kind,
        "TacticName": tactic,
        "Inputs": [{"Name": f"__mye{i}", "Dimensions": [4, 40, 64], "Format/Datatype": t} for i, t in enumerate(types)],
        "Outputs": [{"Name": "y", "Dimensions": [4, 40, 64], "Format/Datatype": HALF}],
        "StreamId": 0,
        "Metadata": between.join(f"{prefix}{node}]" for node in nodes),
    }


def attention(block):
    return [f"blocks.{block}.attn/{name}" for name in ("MatMul", "Softmax", "MatMul_1")]


def a100_fused(types=(HALF, HALF, HALF), between=""):
    """TensorRT 10.10 on an A100, detailed: NVIDIA/TensorRT#4397, ``_gemm_mha_v2_myl0_24`` and the gemm after it."""
    fused = [
        layer(f"_gemm_mha_v2_myl0_{i}", "kgen", "_gemm_mha_v2_0x957a2fe283f77d", attention(i), types, between)
        for i in range(DEPTH)
    ]
    gemm = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
    return fused + [
        layer(f"/{n.replace('.', '_')}/MatMul_myl0_25", "gemm", gemm, [f"{n}/MatMul", f"{n}/Add"]) for n in LINEARS
    ]


def fp8_gemms():
    """TensorRT 10 on SM100 names FP8 products ``cutlass3x_sm100_tensorop_..._f8_f8_f32_f16_f16``."""
    kernel = "cutlass3x_sm100_tensorop_s256x256x32gemm_f8_f8_f32_f16_f16"
    return [layer(f"{n}/MatMul_myl0_3", "gemm", kernel, [f"{n}/MatMul"], (FP8, FP8, FLOAT)) for n in LINEARS]


def unnamed(fused=DEPTH, types=(HALF,)):
    """Torch-TensorRT's documentation shows kernels of TensorRT 10 with an empty ``Metadata``."""
    layers = [layer(f"_gemm_mha_v2_myl0_{i}", "kgen", "_gemm_mha_v2_0xfa6c", types=types) for i in range(fused)]
    return [*layers, layer("__myl_MulSum_myl0_9", "kgen", "__myl_MulSum_0xfa6c", types=(FLOAT,))]


def a100_unfused():
    """TensorRT 9.2 on an A100: NVIDIA/TensorRT#3665, products that are ``gemm`` of a ``__mye`` name, as our nodes."""
    layers = []
    for i in range(DEPTH):
        product, softmax, values = attention(i)
        layers += [
            layer(f"__mye672{i}_unroll0", "gemm", "", [product], (HALF, HALF, FLOAT, FLOAT)),
            layer(f"__myl_MaxSubExpSumDivMul_myl0_{i}", "kgen", "__myl_MaxSubExpSumDivMul_0x1", [softmax]),
            layer(f"__mye673{i}_unroll0", "gemm", "", [values], (HALF, HALF, FLOAT, FLOAT)),
        ]
    return layers


def a100_without_onnx_names():
    """The same dump as it is: its metadata holds TensorRT's own names, and waits and signals are layers."""
    return [
        layer("__mye6916", "wait", nodes=[]),
        layer("shuffle_output_[SHUFFLE]_[reshape]_[x7]_first_transpose", "kgen", "__myl_bb1_4_Tra", types=(HALF,)),
        layer("__mye6723_unroll0", "gemm", "", types=(HALF, HALF, FLOAT, FLOAT)),
    ]


def region():
    """TensorRT 10.10 without detailed verbosity: NVIDIA/TensorRT#4397; 8.6 to 10.x: #3768."""
    return ["{ForeignNode[blocks.0.attn.qkv/MatMul + blocks.0.attn/MatMul...blocks.2.mlp.fc2/MatMul]}", "Reformatting"]


DUMPS = {
    "fused, A100, 10.10": (a100_fused(), "fp16", {"fused attention": "yes"}),
    "fused, with separators": (a100_fused(between="\x1e"), "fp16", {"fused attention": "yes"}),
    "fused kernels without metadata": (unnamed(), "fp16", {"fused attention": "yes"}),
    "two of three without metadata": (unnamed(2), "fp16", {"fused attention": "cannot tell"}),
    "unfused, A100, 9.2": (a100_unfused(), "fp16", {"fused attention": "no"}),
    "names of TensorRT alone": (a100_without_onnx_names(), "fp16", {"fused attention": "cannot tell"}),
    "one region": (region(), "fp16", {"fused attention": "cannot tell"}),
    "attention is not fused in FP32": (a100_unfused(), "fp32", {}),
    # NVIDIA/TensorRT#4516: 10.8 computes attention in Half although the graph has FP8 there.
    "FP8 with attention in Half, 10.8": (
        a100_fused()[:DEPTH] + fp8_gemms(), "fp8", {"fused attention": "yes", "FP8 attention": "no"},
    ),
    "FP8": (
        a100_fused((FP8, FP8, FP8, FLOAT))[:DEPTH] + fp8_gemms(), "fp8",
        {"fused attention": "yes", "FP8 attention": "yes"},
    ),
    "FP8 without metadata": (unnamed(types=(FP8, FP8)), "fp8", {"fused attention": "yes", "FP8 attention": "yes"}),
    "Half without metadata": (unnamed(), "fp8", {"fused attention": "yes", "FP8 attention": "no"}),
    "FP8 in one region": (region(), "fp8", {"fused attention": "cannot tell", "FP8 attention": "cannot tell"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(fp16_bundle):
    return lambda precision: Manifest.from_json(
        {**json.loads((Path(fp16_bundle) / "manifest.json").read_text()), "precision": precision, "float_parts": []}
    )


@pytest.mark.parametrize(("layers", "precision", "verdicts"), DUMPS.values(), ids=DUMPS)
def test_attention_gets_one_of_three_verdicts(manifest, layers, precision, verdicts):
    census = take_census(parse_layers(json.dumps({"Layers": layers, "Bindings": []})))
    found = judge_census(census, manifest(precision), [])
    assert {finding.subject: finding.verdict for finding in found} == verdicts


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [(fp8_gemms(), "yes"), (a100_fused(), "no"), (fp8_gemms()[:-1], "cannot tell"), (region(), "cannot tell")],
)
def test_linear_layers_get_one_of_three_verdicts(manifest, layers, verdict):
    census = take_census(parse_layers(json.dumps({"Layers": layers})))
    assert judge_census(census, manifest("int8"), LINEARS)[-1].verdict == verdict


def test_one_profile_without_fusion_decides():
    layers = a100_fused() + [{**one, "Name": one["Name"] + " [profile 1]"} for one in a100_unfused()[:3]]
    census = take_census(layers, profiles=2)
    assert census.fused_attention == ("blocks.1.attn", "blocks.2.attn")
    assert census.unfused_attention == ("blocks.0.attn",)
    assert take_census(unnamed() + unnamed(), profiles=2).unnamed_fused == DEPTH


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null", '{"Layers": 3}', '{"Layers": [3]}', '{"Layers": null}'])
def test_a_text_that_is_no_list_of_layers_has_none(text):
    assert parse_layers(text) == []
