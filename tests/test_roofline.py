"""The roofline: operations and bytes by hand, bounds and shares, measured peaks, and TensorRT's layers by part."""

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling import roofline as roof
from phreg_deploy.profiling.device.peaks import Peaks
from phreg_deploy.profiling.operations import count_parts
from phreg_deploy.profiling.roofline import place_layer
from phreg_deploy.spec import ModelSpec
from tests.profile_helpers import TINY, layer_metadata

BASE = ModelSpec("vit_base_patch16_224", "vit", (16, 16), (14, 14), 768, 12, 12, True, 0, 86_000_000)
AT = {"batch": 1, "size": (224, 224)}
NORM = "__myl_CastMeanSubMulMeanAddSqrtDivMulCastMulAdd"


def test_a_known_model_has_the_known_count():
    parts = count_parts(BASE, **AT)
    products = ("patch embed", "qkv", "attention products", "proj", "fc1", "fc2")
    exact = 196 * 768 * 768 + 12 * (12 * 197 * 768 * 768 + 2 * 197 * 197 * 768)
    assert exact == pytest.approx(17.6e9, rel=0.02)
    assert sum(parts[name][0] for name in products) / 2 == pytest.approx(exact, rel=0.005), "except for biases and GELU"
    assert sum(work for work, _ in parts.values()) / 2 == pytest.approx(17.6e9, rel=0.02)


def test_operations_and_bytes_are_those_counted_by_hand():
    """2 images of 8x12 at patch 4: 6 patches and 2 prefix tokens, so 16 rows of width 8; 2 heads of 4; 3 blocks."""
    parts = count_parts(TINY, batch=2, size=(8, 12), activation_bytes=2, weight_bytes=1, hidden=20)
    assert parts["patch embed"] == (2 * 12 * 48 * 8 + 2 * 12 * 8, 12 * 48 + 2 * 12 * 8 + 8 * 49 + 2 * 6 * 8)
    assert parts["qkv"] == (3 * (2 * 16 * 8 * 24 + 16 * 24), 3 * (2 * 16 * 32 + 24 * 9))
    assert parts["attention products"] == (3 * 4 * 2 * 2 * 8 * 8 * 4, 3 * 2 * 4 * 16 * 8)
    assert parts["softmax"] == (3 * 5 * 2 * 2 * 8 * 8, 0)
    assert parts["proj"] == (3 * (2 * 16 * 8 * 8 + 16 * 8), 3 * (2 * 16 * 16 + 8 * 9))
    assert parts["fc1"] == (3 * (2 * 16 * 8 * 20 + 9 * 16 * 20), 3 * (2 * 16 * 28 + 20 * 9))
    assert parts["fc2"] == (3 * (2 * 16 * 20 * 8 + 16 * 8), 3 * (2 * 16 * 28 + 8 * 21))
    assert parts["norm"] == (7 * 8 * 16 * 8, 7 * 2 * 2 * 16 * 8)
    assert parts["residual"] == (3 * 2 * 16 * 8, 3 * 2 * 2 * 16 * 8)
    apart = count_parts(TINY, batch=2, size=(8, 12), weight_bytes=1, hidden=20, fused_attention=False)
    assert apart["softmax"][1] == 3 * 2 * 2 * 2 * 2 * 64
    assert apart["attention products"][1] == parts["attention products"][1] + apart["softmax"][1]
    for batch, side, said in ((1, 230, "224x224 and 240x240"), (0, 224, "at least 1")):
        with pytest.raises(PhregError, match=said):
            count_parts(BASE, batch=batch, size=(side, side))


def test_each_part_has_its_bound_and_its_share_of_the_peak():
    layers = {"fc1": 50.0, "attention": 8.0, "other": 1.0}
    found = roof.roofline(BASE, Peaks(1e12, 1e10), **AT, measured_ms=100.0, layers_ms=layers)
    rows = {row["part"]: row for row in found["parts"]}
    assert [rows[part]["bound"] for part in ("fc1", "norm", "softmax")] == ["compute", "bandwidth", "compute"]
    assert rows["fc1"]["ideal_ms"] == pytest.approx(rows["fc1"]["flops"] / 1e9)
    assert rows["norm"]["ideal_ms"] == pytest.approx(rows["norm"]["bytes"] / 1e7)
    ratio = pytest.approx(rows["fc1"]["flops"] / rows["fc1"]["bytes"])
    assert (rows["fc1"]["intensity"], rows["softmax"]["intensity"]) == (ratio, None), "softmax moves no bytes"
    total = found["total"]
    shares = total["share_of_flops"], total["share_of_bandwidth"]
    assert shares == pytest.approx((total["flops"] / 1e11, total["bytes"] / 1e9))
    assert total["share_of_ideal"] == pytest.approx(sum(row["ideal_ms"] for row in rows.values()) / 100)
    assert set(found["measured"]) == {"fc1", "attention"}
    ideal = rows["attention products"]["ideal_ms"] + rows["softmax"]["ideal_ms"]
    assert found["measured"]["attention"]["share_of_ideal"] == pytest.approx(ideal / 8)
    unknown = roof.roofline(BASE, Peaks(None, 1e10), **AT, measured_ms=100.0, layers_ms=layers)
    assert {row["bound"] for row in unknown["parts"]} == {None, unknown["total"]["ideal_ms"]}
    assert unknown["total"]["share_of_flops"] is None
    assert unknown["total"]["share_of_bandwidth"] == total["share_of_bandwidth"]


def test_eight_bit_parts_are_held_against_their_own_peak():
    peaks = Peaks(2e12, 1e15, precision="int8", around=1e12)
    plain = roof.roofline(BASE, Peaks(1e12, 1e15), **AT, measured_ms=100.0)
    found = roof.roofline(BASE, peaks, **AT, measured_ms=100.0, eight_bit=roof.EIGHT_BIT_PARTS["int8"])
    before, now = ({row["part"]: row["ideal_ms"] for row in one["parts"]} for one in (plain, found))
    for part in before:
        ratio = 2 if part in ("qkv", "proj", "fc1", "fc2") else 1
        assert now[part] == pytest.approx(before[part] / ratio)
    assert found["total"]["share_of_flops"] == pytest.approx(found["total"]["ideal_ms"] / 100)
    assert plain["total"]["share_of_flops"] == pytest.approx(plain["total"]["ideal_ms"] / 100)
    lacking = roof.roofline(BASE, Peaks(2e12, 1e15), **AT, measured_ms=100.0, eight_bit=roof.EIGHT_BIT_PARTS["int8"])
    assert lacking["total"]["share_of_flops"] is None, "the peak of the other parts is not known"


def test_a_readout_counts_only_what_its_last_block_runs():
    one = {**AT, "activation_bytes": 2}
    final = count_parts(BASE, **one)
    value, neighbour = (count_parts(BASE, **one, readout=name) for name in ("value", "neighbour"))
    for found in (value, neighbour):
        for part in ("fc1", "fc2", "residual"):
            assert found[part] == pytest.approx([11 / 12 * cost for cost in final[part]])
        assert found["proj"] == final["proj"]
        assert found["patch embed"] == final["patch embed"]
        assert final["norm"][0] - found["norm"][0] == pytest.approx(8 * 197 * 768)
    assert value["attention products"][0] == pytest.approx(11 / 12 * final["attention products"][0])
    assert neighbour["attention products"] == final["attention products"]
    rows = 197 * 768
    lacks = [final["qkv"][0] - found["qkv"][0] for found in (value, neighbour)]
    assert lacks == pytest.approx([(2 * 768 + 1) * 2 * rows, (2 * 768 + 1) * rows])


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("__myl_FcAdd_myl0_2", layer_metadata("dense/MatMul", "dense/Add"), (None, "patch embed")),
        (
            "__myl_CastAddReshTran",
            layer_metadata("dense/Reshape", "dense/Transpose", "dense/Sub", "dense/Cast"),
            (None, "patch embed"),
        ),
        (
            "__mye86549+__mye86537",
            "[ONNX Layer: blocks.3.attn.qkv.v/MatMul]\n[ONNX Layer: blocks.3.attn.qkv.k/MatMul]",
            (3, "qkv"),
        ),
        ("blocks.1.attn.qkv.v/MatMul+blocks.1.attn.qkv.k/MatMul+blocks.1.attn.qkv.q/MatMul", "", (1, "qkv")),
        (
            "__myl_MulAddMulCastReshTranReshMove",
            layer_metadata("blocks.1.attn.qkv.k/MatMul", "layer_norm_2/DequantizeLinear", "blocks.1.attn/Reshape_2"),
            (1, "qkv"),
        ),
        ("_gemm_mha_v2_myl0_15", "", (None, "attention")),
        (NORM, "", (None, "norm")),
        ("norm/LayerNormalization_2", "", (None, "norm")),
        (
            "_gemm_mha_v2",
            layer_metadata("softmax/QuantizeLinear", "blocks.11.attn/MatMul_2", "blocks.11.attn/Softmax"),
            (11, "attention"),
        ),
        (
            "__myl_FcAddAdd",
            layer_metadata("blocks.1.attn.proj/MatMul", "blocks.1.attn.proj/Add", "blocks.1/Add"),
            (1, "proj"),
        ),
        (
            "__myl_MulAddAddCastMeanSubMulMeanAddSqrtDivMulCast",
            layer_metadata("blocks.0.mlp.fc2/MatMul", "blocks.0/Add_2", "blocks.1.norm1/LayerNormalization"),
            (1, "norm"),
        ),
        (
            "__myl_FcAddDivCastErfCastAddMul",
            layer_metadata("blocks.0.mlp.fc1/MatMul", "blocks.0.mlp.act/Gelu", "gelu/QuantizeLinear"),
            (0, "fc1"),
        ),
        ("blocks.2.mlp.fc2/MatMul_myl0_17", "", (2, "fc2")),
        ("blocks.2.attn.qkv/MatMul + blocks.2.attn.qkv/Add", "", (2, "qkv")),
        (
            "blocks.0.mlp.fc2/MatMul",
            layer_metadata("blocks.0.mlp.fc2/MatMul", "blocks.0.mlp.fc2/weight/DequantizeLinear"),
            (0, "fc2"),
        ),
        ("__mye1", layer_metadata("blocks.1.mlp.fc1/MatMul", "blocks.1.mlp.fc2/MatMul"), (None, "other")),
        ("Reformatting CopyNode for blocks.1.mlp.fc1/MatMul", "", (None, "other")),
        ("{ForeignNode[dense/Cast...norm/LayerNormalization_2]}", "", (None, "other")),
        ("__myl_Move", layer_metadata("dense/Gather"), (None, "other")),
    ],
)
def test_each_layer_belongs_to_a_part_and_a_block(name, metadata, expected):
    assert place_layer(name, metadata) == expected


def test_layers_are_grouped_and_nothing_is_lost():
    fc1 = {"blocks.10.mlp.fc1/MatMul": 8.0, "blocks.2.mlp.fc1/MatMul": 16.0}
    layers = {"a": 1.0, "b": 2.0, "_gemm_mha_v2_myl0_15": 4.0, **fc1, NORM: 32.0}
    found = roof.group_layers(
        layers, {"a": layer_metadata("dense/MatMul"), "b": layer_metadata("blocks.2.attn.proj/MatMul")}
    )
    assert (found["total_ms"], sum(found["parts"].values()), found["unplaced_ms"]) == (63.0, 63.0, 36.0)
    told = {part: took for part, took in found["parts"].items() if took}
    assert told == {"patch embed": 1.0, "norm": 32.0, "attention": 4.0, "proj": 2.0, "fc1": 24.0}
    assert list(found["blocks"].items()) == [("2", {"proj": 2.0, "fc1": 16.0}), ("10", {"fc1": 8.0})]
