"""The exam, ``check`` and 8 bits over the answers of heads."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration import calibrate
from phreg_deploy.heads import attach
from phreg_deploy.heads.answers import attached_heads
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam, missed_gates
from phreg_deploy.verify import check
from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.head_helpers import head


def labels_of(bundle):
    """Classes of the first case of a bundle's exam."""
    return bundle.cases()[0]["segmentation"].argmax(-1)


@pytest.mark.parametrize("labels", [False, True])
def test_a_wrong_head_fails_the_exam(bundle, street, tmp_path, labels):
    attach(bundle, {"": street}, tmp_path / "street", labels=labels)
    name = "labels" if labels else "segmentation"
    with FeatureExtractor.load(tmp_path / "street", "onnxruntime-cpu") as extractor:
        parity, gates = judge_exam(extractor.bundle, extractor.run, "onnxruntime-cpu", "fp32")
    assert parity.head_change == 0
    assert "head_change" in {gate.name for gate in gates}
    broken = BrokenBundle(tmp_path / "street", tmp_path / "broken")
    if labels:
        for node in broken.model.graph.node:
            if node.op_type == "ArgMax":
                node.op_type = "ArgMin"
    else:
        scale_outputs(broken, segmentation=-1.0)
    with FeatureExtractor.load(broken.save(), "onnxruntime-cpu", examine=False) as extractor:
        parity, _ = judge_exam(extractor.bundle, extractor.run, "onnxruntime-cpu", "fp32")
    assert parity.head_change > 0.5
    assert parity.cosine_min > 0.9999
    (missed,) = missed_gates(parity, "fp32", exam=True)
    assert f"a head's answers change at {parity.head_change:.4f} of the places" in missed
    assert name in Bundle.read(tmp_path / "street").manifest.outputs


@pytest.mark.parametrize("bins", [None, (1.0, 2.0, 8.0)])
def test_check_compares_heads_with_pytorch(bundle, student, street, photos, tmp_path, bins):
    depth = head(1 if bins is None else 3, task="depth", bins=bins, depth_range=(1.0, 30.0))
    depth = replace(depth, weight=depth.weight * 0.1)
    attach(bundle, {"": street}, tmp_path / "street", labels=True, upsample="joint-bilateral", stride=2)
    attach(tmp_path / "street", {"": depth}, tmp_path / "both")
    (_, first), (_, second) = attached_heads(Bundle.read(tmp_path / "both"))
    for read, given in ((first, street), (second, depth)):
        np.testing.assert_array_equal(read.weight, given.weight)
        assert (read.classes, read.bins, read.depth_range) == (given.classes, given.bins, given.depth_range)
    options = {"reference": str(student), "images": photos, "limit": 4, "backend": "onnxruntime-cpu"}
    report = check(tmp_path / "both", **options)
    assert not report.missed
    (gate,) = [gate for gate in report.gates[f"PyTorch {student}"] if gate.name == "head_change"]
    assert gate.figure < 0.01
    broken = BrokenBundle(tmp_path / "both", tmp_path / "broken")
    for node in broken.model.graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ArgMin"
    missed = check(broken.save(), **options).gates[f"PyTorch {student}"]
    assert [gate.name for gate in missed if not gate.passed] == ["head_change"]


def test_eight_bits_take_a_head_as_float_does(bundle, street, photos, tmp_path):
    calibrate(bundle, photos, tmp_path / "int8", cosine_p1=0.9)
    attach(bundle, {"": street}, tmp_path / "float", upsample="bilinear")
    eight = attach(tmp_path / "int8", {"": street}, tmp_path / "eight", upsample="bilinear")
    assert eight.manifest.precision == "int8"
    weights = {i.name: i.data_type for i in onnx.load(eight.graph).graph.initializer}
    assert weights["head.segmentation.weight"] == onnx.TensorProto.FLOAT
    images = sorted(photos.iterdir())[:8]
    labels = []
    for folder in ("float", "eight"):
        with FeatureExtractor.load(tmp_path / folder, "onnxruntime-cpu") as extractor:
            labels.append(extractor(images).labels)
    assert (labels[0] == labels[1]).mean() > 0.9
    report = calibrate(tmp_path / "float", photos, tmp_path / "again", cosine_p1=0.9)
    again = Bundle.read(tmp_path / "again")
    assert "head_change" in {gate.name for gate in report.gates}
    np.testing.assert_array_equal(again.cases()[0]["features"], eight.cases()[0]["features"])
    np.testing.assert_array_equal(again.cases()[0]["segmentation"].argmax(-1), labels_of(eight))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_heads_stay_in_float_for_tensorrt(bundle, street, photos, tmp_path, mode):
    attach(bundle, {"": street}, tmp_path / "float", labels=True, upsample="joint-bilateral", stride=2)
    calibrate(tmp_path / "float", photos, tmp_path / "eight", mode=mode, target="trt", cosine_p1=0.5, force=True)
    graph = onnx.load(Bundle.read(tmp_path / "eight").graph).graph
    kinds = {i.name: i.data_type for i in graph.initializer}
    own = [name for node in graph.node if node.name.startswith("head.") for name in node.input if name in kinds]
    assert {kinds[name] for name in own} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
