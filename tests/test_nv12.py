"""NV12 frames become RGB as ITU-R BT.601 and BT.709 say, and OpenCV computes."""

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.images.nv12 import MATRICES, Nv12Frame
from phreg_deploy.runtime import FeatureExtractor


def planes(height=98, width=130, seed=0):
    random = np.random.default_rng(seed)
    y = random.integers(0, 256, (height, width), dtype=np.uint8)
    return y, random.integers(0, 256, (height // 2, width // 2, 2), dtype=np.uint8)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("limited", [True, False])
def test_the_colours_are_those_of_the_standard(matrix, limited):
    """In double precision: R = Y + 2 (1 - Kr) Cr, B = Y + 2 (1 - Kb) Cb, and Y = Kr R + Kg G + Kb B."""
    y, uv = planes()
    red, blue = MATRICES[matrix]
    luma = (y - 16.0) / 219 if limited else y / 255.0
    cb, cr = np.moveaxis((uv.repeat(2, 0).repeat(2, 1) - 128.0) / (224 if limited else 255), 2, 0)
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    wanted = np.stack([r, (luma - red * r - blue * b) / (1 - red - blue), b], axis=2)
    got = Nv12Frame(y, uv, matrix, limited).rgb()
    assert np.abs(got - np.clip(255 * wanted, 0, 255)).max() < 0.52


def test_grey_black_and_white_are_exact():
    y, uv = np.array([[16, 235], [126, 0]], np.uint8), np.full((1, 1, 2), 128, np.uint8)
    assert Nv12Frame(y, uv).rgb()[..., 1].tolist() == [[0, 255], [128, 0]]
    assert Nv12Frame(y, uv, limited=False).rgb()[..., 1].tolist() == y.tolist()


def test_opencv_gives_the_same_within_a_grey_level():
    cv2 = pytest.importorskip("cv2")
    y, uv = planes(400, 640, 1)
    y = np.maximum(y, 16)  # OpenCV lifts darker luma to black first
    stacked = np.concatenate([y, uv.reshape(200, 640)])
    theirs = cv2.cvtColor(stacked, cv2.COLOR_YUV2RGB_NV12)
    ours = Nv12Frame.of(stacked, "bt601").rgb()
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.1


def test_the_matrix_without_a_mark_is_gstreamers():
    for height, matrix in ((576, "bt601"), (578, "bt709")):
        y, uv = planes(height, 16)
        np.testing.assert_array_equal(Nv12Frame(y, uv).rgb(), Nv12Frame(y, uv, matrix).rgb())


def test_the_layouts_of_the_planes_are_the_same_frame():
    y, uv = planes()
    wanted = Nv12Frame(y, uv).rgb()
    flat = uv.reshape(49, 130)
    for frame in (
        Nv12Frame(y[..., None], flat),
        Nv12Frame.of(np.concatenate([y, flat])),
        Nv12Frame.of(np.concatenate([y, flat])[..., None]),
        Nv12Frame(np.pad(y, ((0, 0), (0, 30)))[:, :130], np.pad(flat, ((0, 0), (0, 30)))[:, :130]),
    ):
        np.testing.assert_array_equal(frame.rgb(), wanted)


def test_an_extractor_takes_a_frame_in_any_channel_order(bundle):
    y, uv = planes(200, 320)
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1, color="bgr") as extractor:
        wanted = extractor(Nv12Frame(y, uv).rgb(), color="rgb").features
        np.testing.assert_array_equal(extractor(Nv12Frame(y, uv)).features, wanted)
        both = extractor([Nv12Frame(y, uv), Nv12Frame(y, uv)])
        np.testing.assert_allclose(both.features, np.concatenate([wanted, wanted]), atol=1e-5)


REFUSED = {
    "another matrix": (lambda y, uv: Nv12Frame(y, uv, "bt2020"), "matrix: got 'bt2020', expected bt601 or bt709"),
    "odd": (lambda y, uv: Nv12Frame(y[:-1], uv), "expected an even height and width"),
    "another chroma": (lambda y, uv: Nv12Frame(y, uv[:-1]), r"expected uv as \(49, 65, 2\) or \(49, 130\)"),
    "floats": (lambda y, uv: Nv12Frame(y / 255, uv), "got y float64"),
    "no luma": (lambda y, uv: Nv12Frame(y[:0], uv), "at least two pixels a side"),
    "no array": (lambda y, uv: Nv12Frame("y", uv), "got y and uv as str and ndarray, expected uint8 arrays"),
    "no thirds": (lambda y, uv: Nv12Frame.of(y), r"got ndarray \(98, 130\), expected an array \(3 H / 2, W\)"),
    "no shape": (lambda y, uv: Nv12Frame.of("y"), r"got str \(\), expected an array"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_frame_is_refused(bundle, kind):
    make, words = REFUSED[kind]
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as extractor:
        with pytest.raises(PhregError, match=words):
            extractor(make(*planes()))
