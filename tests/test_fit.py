"""``fit``: images padded, cropped or squashed to the input size, with the mask of what is image."""

import json

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import fit_as, patch_mask
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.dense_features import LayerFeatures
from phreg_deploy.spec import Preprocess
from tests.cli_helpers import photograph

STEPS = Preprocess((0.5, 0.25, 0.75), (0.5,) * 3, "bicubic", "center", 0.875)
MEAN = [128, 64, 191]
SIZE, PATCH = (64, 96), (8, 8)


@pytest.fixture(scope="module")
def extractor(wide_bundle):
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("pixels", "inner"),
    [((100, 300), (32, 96)), ((300, 100), (64, 21)), ((64, 96), (64, 96)), ((10, 15), (64, 96)), ((1, 500), (1, 96))],
)
def test_pad_keeps_the_aspect_and_masks_the_rest(pixels, inner):
    picture = photograph(1, pixels[1], pixels[0])
    fitted = fit_as(picture, SIZE, STEPS, PATCH, "pad")
    scaled = np.asarray(picture.resize(inner[::-1], Image.Resampling.BICUBIC))
    assert fitted.image.shape == (*SIZE, 3)
    assert np.array_equal(fitted.image[: inner[0], : inner[1]], scaled)
    assert (fitted.image[inner[0] :] == MEAN).all()
    assert (fitted.image[:, inner[1] :] == MEAN).all()
    rows, columns = (max(1, int(side / 8 + 0.5)) for side in inner)
    assert np.array_equal(fitted.mask, np.arange(8)[:, None] * np.ones(12) < rows) or columns < 12
    assert fitted.mask.sum() == rows * columns
    assert fitted.mask[:rows, :columns].all()


def test_crop_and_squash_keep_no_margin():
    picture = photograph(2, 200, 100)
    squashed = fit_as(picture, SIZE, STEPS, PATCH, "squash")
    assert np.array_equal(squashed.image, np.asarray(picture.resize((96, 64), Image.Resampling.BICUBIC)))
    cropped = fit_as(picture, SIZE, STEPS, PATCH, "crop")
    scaled = np.asarray(picture.resize((128, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(cropped.image, scaled[:, 16:112])
    assert squashed.mask is cropped.mask is None


def test_a_patch_is_image_from_half_of_its_sides():
    assert patch_mask((12, 11), (3, 3), (8, 8)).tolist() == [[True, False, False], [True, False, False], [False] * 3]


def test_bgr_arrays_are_turned_and_padding_is_not():
    array = np.asarray(photograph(3, 90, 20))
    turned = fit_as(array[..., ::-1], SIZE, STEPS, PATCH, "pad", bgr=True)
    assert np.array_equal(turned.image, fit_as(array, SIZE, STEPS, PATCH, "pad").image)


def test_a_call_returns_the_mask_of_each_image(extractor):
    images = [photograph(4, 120, 60), photograph(5, 60, 120), photograph(6, 80, 80)]
    dense = extractor(images, (64, 64), fit="pad")
    assert dense.mask.shape == dense.token_norm.shape == (3, 8, 8)
    assert [int(mask.sum()) for mask in dense.mask] == [32, 32, 64]
    assert np.isfinite(dense.features).all()
    for i, image in enumerate(images):
        alone = extractor.dense(extractor.prepare(image, (64, 64), fit="pad")[None])
        np.testing.assert_allclose(dense.features[i], alone.features[0], rtol=1e-4, atol=1e-5)
    assert extractor(images, (64, 64)).mask is None
    assert extractor(images, (64, 64), fit="crop").mask is None


def test_the_artifact_rate_leaves_padding_out():
    norms = np.ones((2, 2, 4))
    norms[0, 1] = 9
    norms[1, 0, 0] = 9
    mask = np.zeros((2, 2, 4), bool)
    mask[:, 0] = True
    features = np.zeros((2, 2, 4, 3))
    assert LayerFeatures(features, None, norms, 1.0, mask).artifact_rate.tolist() == [0, 0.25]
    assert LayerFeatures(features, None, norms, None, mask).artifact_rate.tolist() == [0, 0.25]
    assert LayerFeatures(features, None, norms, 1.0).artifact_rate.tolist() == [0.5, 0.125]


def test_an_unknown_fit_is_refused(extractor):
    with pytest.raises(PhregError, match="fit: got 'stretch', expected pad, crop or squash"):
        extractor(photograph(1, 50, 50), fit="stretch")


HERE = ("--backend", "onnxruntime-cpu", "--threads", "1", "--json")


@pytest.fixture
def wide_picture(tmp_path):
    photograph(7, 300, 150).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def test_extract_pads_and_writes_the_mask(world, run_cli, wide_picture):
    options = ("--fit", "pad", "--pictures", "--dtype", "float16")
    report = run_cli("extract", world.bundle, wide_picture, "-o", world.out, *options, *HERE).document
    (entry,) = report["images"]
    assert report["settings"]["fit"] == "pad"
    mask = np.load(world.out / entry["mask"])
    assert mask.dtype == bool
    assert mask.sum() == 32
    with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
        dense = extractor(wide_picture, fit="pad")
    assert np.array_equal(np.load(world.out / entry["features"]), dense.features[0].astype(np.float16))
    assert entry["artifact_rate"] == pytest.approx(float(dense.artifact_rate[0]))


def test_extract_serves_windows_and_resumes(world, run_cli, wide_picture):
    words = ["extract", world.bundle, wide_picture, "-o", world.out, "--window", "64", "--outputs", "features,cls"]
    report = run_cli(*words, "--stride", "40", "--pictures", *HERE).document
    (entry,) = report["images"]
    assert entry["shape"] == [19, 38, 48]
    assert (report["settings"]["size"], report["settings"]["stride"]) == ([64, 64], [40, 40])
    with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
        tiled = extractor.tiled(wide_picture, 64, 40)
    for kind, expected in (("features", tiled.features), ("cls", tiled.cls), ("mask", tiled.mask)):
        assert np.array_equal(np.load(world.out / entry[kind]), expected[0])
    run_cli(*words, "--resume", "--pictures", *HERE).refused(2, "another stride")
    resumed = run_cli(*words, "--resume", "--pictures", "--stride", "40", *HERE)
    assert resumed.document["images"] == json.loads(json.dumps(report["images"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "32"], "got a stride without a window"),
        (["--window", "64", "--fit", "pad"], "got --window and --fit"),
        (["--window", "64", "--image-size", "64"], "got --window and --image-size"),
        (["--window", "48"], "image size: got 48x48, expected 64x64"),
        (["--window", "64", "--stride", "4"], "stride: got 4x4"),
        (["--window", "big"], "expected a number or HEIGHTxWIDTH"),
        (["--outputs", "mask"], "got mask without padding"),
    ],
)
def test_wrong_options_are_refused(world, run_cli, wide_picture, options, message):
    run_cli("extract", world.bundle, wide_picture, "-o", world.out, *options, *HERE).refused(2, message)
    assert not world.out.exists()
