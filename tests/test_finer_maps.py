"""Answers of heads at a stride, enlarged by the image's colours."""

from dataclasses import replace

import numpy as np
import pytest

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.heads import attach
from phreg_deploy.runtime import FeatureExtractor

BACKENDS = ["onnxruntime-cpu", "openvino"]


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
