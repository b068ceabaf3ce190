"""``FeatureExtractor.tiled``: images of any size from windows, and the seams between windows."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import DenseFeatures, FeatureExtractor
from phreg_deploy.runtime.tiling import tile
from phreg_deploy.spec import Preprocess
from tests.cli_helpers import photograph

PATCH = 8


@pytest.fixture(scope="module")
def extractor(wide_bundle):
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def fixed(bundle):
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


def test_one_window_is_the_whole_image(extractor):
    image = np.asarray(photograph(1, 64, 64))
    tiled, dense = extractor.tiled(image), extractor.dense(image[None])
    for name, value in dense.outputs().items():
        np.testing.assert_allclose(tiled.outputs()[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert isinstance(tiled, DenseFeatures)
    assert tiled.mask.all()
    assert tiled.artifact_rate == pytest.approx(dense.artifact_rate)
    assert len(tiled.windows) == 1


@pytest.mark.parametrize("pixels", [(200, 330), (65, 71), (30, 200), (20, 11)])
def test_any_size_has_a_patch_grid_of_its_own(fixed, pixels):
    image = photograph(2, pixels[1], pixels[0])
    tiled = fixed.tiled(image)
    grid = tuple(-(-side // PATCH) for side in pixels)
    assert tiled.features.shape == (1, *grid, 48)
    assert tiled.token_norm.shape == tiled.mask.shape == (1, *grid)
    assert np.isfinite(tiled.features).all()
    assert tiled.mask.sum() == np.prod([max(1, int(side / PATCH + 0.5)) for side in pixels])
    assert tiled.window_cls.shape == (len(tiled.windows), 48)
    np.testing.assert_allclose(tiled.cls, tiled.window_cls.mean(0)[None], rtol=1e-5)
    assert tiled.window_artifact_rate.shape == (len(tiled.windows),)


def test_features_are_the_weighted_mean_of_the_windows(fixed):
    """64 x 96 pixels in windows of 64 x 64, 32 apart: two windows, which share four of twelve columns."""
    image = np.asarray(photograph(3, 96, 64))
    left, right = (fixed.dense(image[None, :, start : start + 64]) for start in (0, 32))
    rise = np.sin(np.pi * (np.arange(8) + 0.5) / 8) ** 2
    share = rise[4:] / (rise[4:] + rise[:4])
    tiled = fixed.tiled(image)
    assert tiled.windows.columns == (0, 4)
    for name in ("features", "token_norm"):
        a, b, got = (getattr(one, name)[0] for one in (left, right, tiled))
        weights = share.reshape(4, *(1,) * (a.ndim - 2))
        np.testing.assert_allclose(got[:, :4], a[:, :4], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[:, 8:], b[:, 4:], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[:, 4:8], weights * a[:, 4:] + (1 - weights) * b[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tiled.window_artifact_rate, [left.artifact_rate[0], right.artifact_rate[0]])


def test_windows_are_batched_and_never_exceed_the_bundles_batch(extractor, monkeypatch):
    sizes, image = [], photograph(4, 200, 150)
    real = FeatureExtractor.dense
    monkeypatch.setattr(FeatureExtractor, "dense", lambda self, batch: sizes.append(len(batch)) or real(self, batch))
    told = []
    tiled = extractor.tiled(image, 64, 32, report=lambda done, of: told.append((done, of)))
    assert max(sizes) == extractor.manifest.batches.highest == 4
    assert sum(sizes) == len(tiled.windows) == 6 * 4
    assert told == [(4 * i, 24) for i in range(1, 7)]


def test_colour_order_and_exif_are_those_of_a_call(fixed, tmp_path):
    picture = photograph(5, 120, 80)
    expected = fixed.tiled(picture)
    bgr = np.asarray(picture)[..., ::-1]
    assert np.array_equal(fixed.tiled(bgr, color="bgr").features, expected.features)
    tag = Image.Exif()
    tag[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=tag)
    assert fixed.tiled(tmp_path / "turned.png").features.shape[1:3] == (15, 10)
    upright = fixed.tiled(tmp_path / "turned.png", exif=False)
    assert np.array_equal(upright.features, expected.features)


def test_giant_photographs_keep_their_pixels(fixed, tmp_path, monkeypatch):
    from phreg_deploy.images import decoding

    monkeypatch.setattr(decoding, "GIANT", 5000)
    photograph(6, 160, 120).save(tmp_path / "giant.jpg")
    assert fixed.tiled(tmp_path / "giant.jpg").features.shape[1:3] == (15, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 40}, "image size: got 40x40, expected 48x48 to 96x96"),
        ({"window": (64, 60)}, "image size: got 64x60"),
        ({"window": "64"}, "window: got '64', expected pixels"),
        ({"window": (64, 64, 3)}, "window: got"),
        ({"stride": 4}, "stride: got 4x4, expected from a patch"),
        ({"stride": 3.5}, "stride: got 3.5, expected pixels"),
        ({"window": 48, "stride": 64}, "to the window, 48x48"),
    ],
)
def test_wrong_windows_are_refused(extractor, arguments, message):
    with pytest.raises(PhregError) as error:
        extractor.tiled("there-is-no-such-file.png", **arguments)
    assert message in str(error.value)


def test_several_images_are_refused(extractor):
    with pytest.raises(PhregError, match="tiled: got 2 images, expected one"):
        extractor.tiled(np.zeros((2, 100, 100, 3), np.uint8))


def seam_errors(tiled, whole):
    """1 - cosine to the whole image's features: over patches beside a window's border, and over all others."""
    error = 1 - cosine(tiled.features[0], whole.features[0])
    near = np.zeros(error.shape, bool)
    for axis, starts in enumerate((tiled.windows.rows, tiled.windows.columns)):
        size = tiled.windows.shape[axis]
        borders = {start for start in starts if start} | {s + size for s in starts if s + size < near.shape[axis]}
        lines = [line for border in borders for line in (border - 1, border)]
        near[lines if axis == 0 else (slice(None), lines)] = True
    return error[near].mean(), error[~near].mean()


def jump(tiled):
    """Distance between neighbouring patches across the first window's right border, over that between all others."""
    step = 1 - cosine(tiled.features[0][:, 1:], tiled.features[0][:, :-1])
    border = tiled.windows.shape[1] - 1
    return step[:, border].mean() / np.delete(step, border, axis=1).mean()


def test_seams_are_hidden(extractor):
    """96 x 96 pixels fit into the graph whole, and into windows of 48.

    Beside the windows' borders the blended features are as near to the whole image's as elsewhere, to 10 %.
    """
    images = [np.asarray(photograph(seed, 96, 96)) for seed in range(6)]
    errors = [seam_errors(extractor.tiled(image, 48, 24), extractor.dense(image[None])) for image in images]
    near, elsewhere = np.mean(errors, axis=0)
    assert 0.01 < near <= 1.1 * elsewhere


def test_overlap_halves_the_jump_at_a_border(extractor):
    images = [np.asarray(photograph(seed, 96, 96)) for seed in range(6)]
    blended, apart = (np.mean([jump(extractor.tiled(i, 48, stride)) for i in images]) for stride in (24, 48))
    assert apart > 2, "without overlap the border shows, or this test has no teeth"
    assert blended <= 0.5 * apart


def test_memory_holds_the_result_and_one_batch(fixed):
    image = np.zeros((512, 512, 3), np.uint8)
    tracemalloc.start()
    tiled = fixed.tiled(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tiled.windows) == 15 * 15
    assert peak < 1.3 * tiled.features.nbytes, "all windows together are four times the result"


@pytest.mark.parametrize("pixels", [(100, 130), (40, 52)])
def test_heads_on_pixels_and_patches_are_those_of_the_whole_image(pixels):
    """The heads of this model answer with the image itself, so windows must give it back."""
    image = np.asarray(photograph(8, pixels[1], pixels[0]))
    heads = (
        ServedHead("", "depth", "bilinear", 1, None, (), None, None),
        ServedHead("", "labels", "bilinear", 1, None, ("a",), None, None),
        ServedHead("coarse", "segmentation", None, None, None, ("a", "b", "c"), None, None),
    )

    def dense(batch):
        patches = batch.reshape(len(batch), 6, 8, 6, 8, 3).mean((2, 4), dtype=np.float32)
        outputs = {"features": patches, "token_norm": patches[..., 0] + 1, "attention": patches.transpose(0, 3, 1, 2)}
        outputs |= {"depth": batch[..., 0].astype(np.float32), "labels": batch[..., 1]}
        return DenseFeatures.of({**outputs, "segmentation.coarse": patches}, None, heads)

    model, batches = SimpleNamespace(patch=(8, 8)), SimpleNamespace(highest=4)
    manifest = SimpleNamespace(model=model, batches=batches, heads=heads, norm_median=None)
    steps = Preprocess((0.5,) * 3, (0.5,) * 3, "bicubic", "center", 0.9)
    tiled = tile(image, dense, manifest, steps, (48, 48), (24, 24))
    np.testing.assert_allclose(tiled.depth[0], image[..., 0], atol=1e-3)
    assert np.array_equal(tiled.labels[0], image[..., 1])
    np.testing.assert_allclose(tiled.attention[0].transpose(1, 2, 0), tiled.features[0], rtol=1e-6)
    np.testing.assert_allclose(tiled.heads["segmentation.coarse"], tiled.features, rtol=1e-6)
    whole = image[: pixels[0] // 8 * 8, : pixels[1] // 8 * 8].reshape(pixels[0] // 8, 8, pixels[1] // 8, 8, 3)
    np.testing.assert_allclose(tiled.features[0, : pixels[0] // 8, : pixels[1] // 8], whole.mean((1, 3)), atol=1e-3)
