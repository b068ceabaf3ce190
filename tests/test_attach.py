"""Heads in a bundle's graph: what they serve, several heads, their manifest, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.validity import read_manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.heads import attach
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import invoke
from tests.head_helpers import COLOURS, NAMES, WIDTH, head

BACKENDS = ["onnxruntime-cpu", "openvino"]


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


def test_a_head_reads_several_layers(ranging, frames, tmp_path):
    wide = head(5, 2 * WIDTH, classes=NAMES, layers=(1, 2))
    attach(ranging, {"": wide}, tmp_path / "wide")
    with FeatureExtractor.load(tmp_path / "wide", "onnxruntime-cpu") as extractor:
        dense = extractor.dense(frames)
    joined = np.concatenate([dense.layers[1].features, dense.layers[2].features], axis=-1)
    expected = by_pytorch(joined, wide)
    np.testing.assert_allclose(dense.segmentation, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(dense.labels, dense.segmentation.argmax(-1))


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
    # The last panel but the key is half the image, half the colours of the classes.
    with Image.open(out / image["picture"]) as sheet:
        panels = np.asarray(sheet)
    photo, drawn = (panels[32:288, left : left + 256].astype(int) for left in (12, 12 + 3 * 268))
    expected = (photo + np.array(COLOURS)[values].repeat(4, 0).repeat(4, 1)) / 2
    assert np.abs(drawn - expected).max() <= 1
    # Its key has a patch of the overlay's colour, over grey, for each class that occurs.
    key = panels[32:, 12 + 4 * 268 :].reshape(-1, 3).astype(int)
    for k in np.unique(values):
        assert np.abs(key - (np.array(COLOURS[k]) + 128) / 2).max(-1).min() <= 1
    assert "classes of labels" in invoke("inspect", tmp_path / "street").out
    invoke("extract", bundle, photos, "-o", tmp_path / "no", "--outputs", "labels", "--json").refused(2, "no labels")
