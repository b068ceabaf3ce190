"""Heads in a bundle's graph: what they serve, their exam, several heads, INT8, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.validity import read_manifest
from phreg_deploy.calibration import calibrate
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.heads import Head, attach
from phreg_deploy.heads.answers import attached_heads
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam, missed_gates
from phreg_deploy.verify import check
from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.cli_helpers import invoke

BACKENDS = ["onnxruntime-cpu", "openvino"]
NAMES = ("road", "car", "tree", "sky", "person")
COLOURS = ((128, 64, 128), (0, 0, 142), (107, 142, 35), (70, 130, 180), (220, 20, 60))
WIDTH = 48


def head(outputs=5, width=WIDTH, seed=0, **facts):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, width)).astype(np.float32)
    return Head(weight, rng.standard_normal(outputs).astype(np.float32), **facts)


@pytest.fixture(scope="module")
def street():
    return head(classes=NAMES, colours=COLOURS, ignore=255)


@pytest.fixture(scope="module")
def ranging(student, tmp_path_factory):
    """A bundle for a range of sizes, two layers, one or two images."""
    folder = tmp_path_factory.mktemp("attach") / "bundle"
    return export(str(student), folder, image_size="48x64:64:96", batch="1:1:2", layers="1,2").folder


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(1).integers(0, 256, (2, 80, 64, 3), dtype=np.uint8)


def labels_of(bundle):
    """Classes of the first case of a bundle's exam."""
    return bundle.cases()[0]["segmentation"].argmax(-1)


def by_pytorch(features, head, size=None):
    """Logits ``(B, H, W, K)`` by a 1x1 convolution and PyTorch's interpolation, in float64."""
    maps = torch.from_numpy(features).double().permute(0, 3, 1, 2)
    weight = torch.from_numpy(head.weight).double()[..., None, None]
    logits = torch.nn.functional.conv2d(maps, weight, torch.from_numpy(head.bias).double())
    if size is not None:
        logits = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    return logits.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enlarged", [False, True])
def test_logits_and_labels_equal_pytorch(ranging, street, frames, tmp_path, backend, enlarged):
    pytest.importorskip(backend.partition("-")[0])
    both = {"logits": street, "classes": street}
    method = "bilinear" if enlarged else None
    attach(ranging, {"logits": street}, tmp_path / "logits", upsample=method)
    attach(
        tmp_path / "logits",
        {"classes": street},
        tmp_path / "both",
        upsample="bilinear" if enlarged else None,
        labels=True,
    )
    bundle = Bundle.read(tmp_path / "both")
    assert [head.output for head in bundle.manifest.heads] == ["segmentation.logits", "labels.classes"]
    assert len(both) == len(bundle.manifest.heads)
    with FeatureExtractor.load(tmp_path / "both", backend, compute="fp32") as extractor:
        dense = extractor.dense(frames)
    with FeatureExtractor.load(ranging, backend, compute="fp32") as extractor:
        plain = extractor.dense(frames)
    np.testing.assert_array_equal(dense.features, plain.features)
    expected = by_pytorch(dense.features, street, (80, 64) if enlarged else None)
    logits, classes = dense.heads["segmentation.logits"], dense.heads["labels.classes"]
    assert logits.shape == (2, *((80, 64) if enlarged else (10, 8)), 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert classes.dtype == np.uint8
    assert (classes == expected.argmax(-1)).mean() > 0.999
    assert len(np.unique(classes)) > 1


@pytest.mark.parametrize("bins", [None, tuple(np.linspace(0.5, 40, 9))])
@pytest.mark.parametrize("enlarged", [False, True])
def test_depth_equals_the_heads_own(ranging, frames, tmp_path, bins, enlarged):
    depth = head(1 if bins is None else 9, task="depth", bins=bins, depth_range=(1.0, 30.0), seed=3)
    depth = replace(depth, weight=depth.weight * 0.2)
    attach(ranging, {"": depth}, tmp_path / "depth", upsample="bilinear" if enlarged else None)
    with FeatureExtractor.load(tmp_path / "depth", "onnxruntime-cpu") as extractor:
        dense = extractor.dense(frames)
    expected = depth.labels(dense.features, (80, 64) if enlarged else None)
    assert dense.depth.shape == expected.shape
    np.testing.assert_allclose(dense.depth, expected, rtol=1e-4)
    assert 1 <= dense.depth.min() < dense.depth.max() <= 30
    assert dense.segmentation is None
    assert dense.labels is None


def by_loops(logits, image, stride, patch=8):
    """Joint bilateral upsampling of one image, written as loops over answers and patches, in float64."""
    rows, columns, count = logits.shape
    cells = patch // stride
    pixels = image.astype(np.float64)
    mean = pixels.reshape(rows, patch, columns, patch, 3).mean((1, 3))
    out = np.zeros((rows * cells, columns * cells, count))
    for y in range(rows * cells):
        for x in range(columns * cells):
            colour = pixels[y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].mean((0, 1))
            total = 0.0
            for j in (-1, 0, 1):
                for i in (-1, 0, 1):
                    row, column = y // cells + j, x // cells + i
                    far = ((y + 0.5) / cells - row - 0.5) ** 2 + ((x + 0.5) / cells - column - 0.5) ** 2
                    at = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
                    weight = np.exp(-far / (2 * 0.5**2) - ((colour - mean[at]) ** 2).sum() / (2 * 25.5**2))
                    out[y, x] += weight * logits[at]
                    total += weight
            out[y, x] /= total
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 4])
def test_joint_bilateral_logits_equal_loops(ranging, street, frames, tmp_path, backend, stride):
    pytest.importorskip(backend.partition("-")[0])
    attach(ranging, {"": street}, tmp_path / "fine", upsample="joint-bilateral", stride=stride)
    # Smooth colours, so that several patches count for a place.
    soft = (100 + frames // 8).astype(np.uint8)
    with FeatureExtractor.load(tmp_path / "fine", backend, compute="fp32") as extractor:
        dense = extractor.dense(soft)
    logits = street.logits(dense.features)
    expected = np.stack([by_loops(one, image, stride) for one, image in zip(logits, soft)])
    assert dense.segmentation.shape == (2, 80 // stride, 64 // stride, 5)
    np.testing.assert_allclose(dense.segmentation, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert dense.labels.shape == (2, 80 // stride, 64 // stride)


def test_strides_and_methods_that_do_not_fit_are_refused(bundle, street, tmp_path):
    refused = [
        ({"upsample": "nearest"}, "upsample: got 'nearest', expected bilinear or joint-bilateral"),
        ({"stride": 4}, "stride: got 4 without upsampling"),
        ({"upsample": "bilinear", "stride": 0}, "stride: got 0, expected the pixels"),
        (
            {"upsample": "bilinear", "stride": 3},
            "stride 3, expected one that divides the patch, 8x8: 1, 2, 4, 8",
        ),
    ]
    for options, message in refused:
        with pytest.raises(PhregError, match=message):
            attach(bundle, {"": street}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_manifests_from_before_strides_are_read(bundle, street, tmp_path):
    document = attach(bundle, {"": street}, tmp_path / "street", upsample="bilinear").manifest.to_json()
    new = ServedHead.from_json(document["heads"][0])
    own = {k: v for k, v in document["heads"][0].items() if k not in ("upsampling", "stride")}
    assert ServedHead.from_json({**own, "upsampled": True}) == new
    assert ServedHead.from_json({**own, "upsampled": False}) == replace(new, upsampling=None, stride=None)
    with pytest.raises(PhregError):
        ServedHead.from_json({**own, "upsampled": 1})


def test_a_head_reads_several_layers(ranging, frames, tmp_path):
    wide = head(5, 2 * WIDTH, classes=NAMES, layers=(1, 2))
    attach(ranging, {"": wide}, tmp_path / "wide")
    with FeatureExtractor.load(tmp_path / "wide", "onnxruntime-cpu") as extractor:
        dense = extractor.dense(frames)
    joined = np.concatenate([dense.layers[1].features, dense.layers[2].features], axis=-1)
    expected = by_pytorch(joined, wide)
    np.testing.assert_allclose(dense.segmentation, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(dense.labels, dense.segmentation.argmax(-1))


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


def test_the_manifest_describes_the_heads(bundle, street, tmp_path):
    attach(bundle, {"": street}, tmp_path / "street", labels=True, upsample="bilinear")
    document = json.loads((tmp_path / "street" / "manifest.json").read_text())
    assert document["outputs"]["labels"] == {"dtype": "uint8", "shape": [1, 64, 64]}
    assert document["heads"] == [
        {
            "name": "",
            "kind": "labels",
            "upsampling": "bilinear",
            "stride": 1,
            "layers": None,
            "classes": list(NAMES),
            "colours": [list(colour) for colour in COLOURS],
            "ignore": 255,
        }
    ]
    assert "heads" not in json.loads((bundle / "manifest.json").read_text())
    (own,) = document["heads"]
    changes = [
        {"kind": "label"},
        {"name": "6"},
        {"classes": []},
        {"colours": [[1, 2]]},
        {"layers": [3]},
        {"upsampling": None},
        {"upsampling": "nearest"},
        {"stride": 3},
        {"stride": "1"},
        {"ignore": 300},
    ]
    for change in changes:
        with pytest.raises(PhregError):
            read_manifest({**document, "heads": [{**own, **change}]})
    with pytest.raises(PhregError, match="heads"):
        read_manifest({**document, "heads": [own, own]})
    assert ServedHead.from_json(own).colours == COLOURS


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: head(5, 32, classes=NAMES), "reads 32 channels, but features of the bundle have 48"),
        (lambda: head(5, 48, classes=NAMES, layers=(2,)), "features.2, which the bundle does not serve.*--layers 2"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(bundle, tmp_path, made, message):
    with pytest.raises(PhregError, match=f"^attach: .*{message}"):
        attach(bundle, {"": made()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_attaches_and_extract_writes_labels(bundle, student, street, photos, tmp_path):
    street.write(tmp_path / "street-head")
    command = (
        "attach",
        bundle,
        "--head",
        tmp_path / "street-head",
        "-o",
        tmp_path / "street",
        "--upsample",
        "--labels",
    )
    done = invoke(*command, "--json")
    assert done.code == 0, done.err
    assert done.document["check"]["parity"]["head_change"] == 0
    invoke(*command, "--json").refused(2, "street")
    exported = tmp_path / "exported"
    export_it = ("export", student, "-o", exported, "--head", tmp_path / "street-head", "--upsample", "--labels")
    assert invoke(*export_it, "--json").code == 0
    attached = Bundle.read(tmp_path / "street")
    assert Bundle.read(exported).manifest.files == attached.manifest.files
    refused = invoke("export", student, "-o", tmp_path / "none", "--upsample", "--json")
    refused.refused(2, "upsample: got --upsample without a head")
    again = ("attach", tmp_path / "street", "--head", tmp_path / "street-head", "--labels", "-o", tmp_path / "more")
    invoke(*again, "--json").refused(2, "the output labels would be there twice", "--head NAME=HEAD")
    out = tmp_path / "features"
    done = invoke("extract", tmp_path / "street", photos, "-o", out, "--outputs", "labels", "--pictures", "--json")
    assert done.code == 0, done.err
    for image in done.document["images"]:
        values = np.load(out / image["labels"])
        assert (values.dtype, values.shape) == (np.dtype(np.uint8), (64, 64))
    # The last panel of the picture is half the image, half the colours of the classes.
    with Image.open(out / image["picture"]) as sheet:
        panels = np.asarray(sheet)
    photo, drawn = (panels[32:288, left : left + 256].astype(int) for left in (12, 12 + 3 * 268))
    expected = (photo + np.array(COLOURS)[values].repeat(4, 0).repeat(4, 1)) / 2
    assert np.abs(drawn - expected).max() <= 1
    invoke("extract", bundle, photos, "-o", tmp_path / "no", "--outputs", "labels", "--json").refused(2, "no labels")
