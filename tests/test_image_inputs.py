"""Every kind of image that an extractor takes gives the same features; everything else is refused with the reason."""

import io

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import photograph

URL = "https://example.org/a.jpg"
FRAME = np.asarray(photograph(3, 90, 80))
GREY = np.asarray(photograph(3, 90, 80).convert("L"))


@pytest.fixture(scope="module")
def extractor(bundle):
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as extractor:
        yield extractor


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    path = tmp_path_factory.mktemp("intake") / "frame.png"
    Image.fromarray(FRAME).save(path)
    return path


class ByDlpack:
    """An array of another library, which numpy can read through DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **asked):
        return self.array.__dlpack__(**asked)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


KINDS = {
    "path": lambda png: png,
    "name": lambda png: str(png),
    "bytes": lambda png: png.read_bytes(),
    "bytearray": lambda png: bytearray(png.read_bytes()),
    "memoryview": lambda png: memoryview(png.read_bytes()),
    "BytesIO": lambda png: io.BytesIO(png.read_bytes()),
    "PIL image": lambda png: Image.open(png),
    "array": lambda png: FRAME,
    "batch of one": lambda png: FRAME[None],
    "list of a batch": lambda png: [FRAME[None]],
    "generator": lambda png: (x for x in [FRAME]),
    "strided": lambda png: np.repeat(FRAME, 2, axis=1)[:, ::2],
    "negative strides": lambda png: FRAME[::-1].copy()[::-1],
    "DLPack": lambda png: ByDlpack(FRAME.copy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same_features(extractor, png, kind):
    expected = extractor(Image.fromarray(FRAME))
    got = extractor(KINDS[kind](png))
    assert np.array_equal(got.features, expected.features)
    assert np.array_equal(extractor.prepare(KINDS[kind](png)), extractor.prepare(FRAME))


def test_an_open_file_is_read(extractor, png):
    with open(png, "rb") as file:
        assert np.array_equal(extractor(file).features, extractor(FRAME).features)
    with pytest.raises(PhregError, match="open as text"):
        extractor(io.StringIO("text"))


def test_tensors_of_pytorch_are_arrays(extractor, torch):
    expected = extractor(FRAME).features
    assert np.array_equal(extractor(torch.from_numpy(FRAME.copy())).features, expected)
    assert np.array_equal(extractor(torch.from_numpy(FRAME.copy())[None]).features, expected)
    ready = extractor.prepare(FRAME)[None]
    assert np.array_equal(extractor.dense(torch.from_numpy(ready)).features, expected)
    assert np.array_equal(extractor.run(torch.from_numpy(ready))["features"], extractor.run(ready)["features"])
    with pytest.raises(PhregError, match=r"float32 \(80, 90, 3\), expected uint8"):
        extractor(torch.from_numpy(FRAME.astype(np.float32)))
    with pytest.raises(PhregError, match="Tensor that numpy cannot read"):
        extractor(torch.from_numpy(FRAME.copy()).to(torch.bfloat16))


def test_grey_arrays_are_grey_pictures(extractor):
    expected = extractor(Image.fromarray(GREY)).features
    assert np.array_equal(extractor(GREY).features, expected)
    assert np.array_equal(extractor(GREY[..., None]).features, expected)
    assert np.array_equal(extractor(np.stack([GREY, GREY])[..., None]).features[1:], expected)


def test_lists_may_mix_kinds_and_an_array_may_hold_several(extractor, png):
    other = np.asarray(photograph(4, 90, 80))
    single = [extractor(x).features[0] for x in (FRAME, other, GREY)]
    mixed = extractor([png, np.stack([other, FRAME]), io.BytesIO(png.read_bytes()), GREY])
    assert mixed.features.shape[0] == 5
    for got, expected in zip(mixed.features, (0, 1, 0, 0, 2)):
        assert np.array_equal(got, single[expected])


def test_bgr_is_the_order_of_arrays_and_of_nothing_else(bundle, extractor, png):
    expected = extractor(FRAME).features
    reversed_ = np.ascontiguousarray(FRAME[..., ::-1])
    assert not np.array_equal(extractor(reversed_).features, expected)
    assert np.array_equal(extractor(reversed_, color="bgr").features, expected)
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1, color="bgr") as turned:
        for image in (reversed_, png, Image.fromarray(FRAME)):
            assert np.array_equal(turned(image).features, expected)
        assert np.array_equal(turned(FRAME, color="rgb").features, expected)
        assert np.array_equal(turned.prepare(reversed_), extractor.prepare(FRAME))
    with pytest.raises(PhregError, match="got 'grb', expected rgb or bgr"):
        FeatureExtractor.load(bundle, color="grb")


def test_exif_orientation_is_applied_unless_it_is_turned_off(bundle, extractor):
    data, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(FRAME).save(data, "PNG", exif=turned)
    upright, stored = extractor(np.rot90(FRAME, -1)).features, extractor(FRAME).features
    assert extractor.manifest.preprocess.exif
    assert np.array_equal(extractor(data.getvalue()).features, upright)
    assert np.array_equal(extractor(Image.open(data)).features, upright)
    assert np.array_equal(extractor(data.getvalue(), exif=False).features, stored)
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1, exif=False) as plain:
        assert np.array_equal(plain(data.getvalue()).features, stored)


def masked():
    return np.ma.masked_array(FRAME, FRAME > 250)


class OnDevice:
    __cuda_array_interface__ = {"shape": (8, 8, 3)}  # noqa: RUF012
    __array__ = None


REFUSED = {
    "None": (lambda: None, "a camera read that failed gives None"),
    "None in a list": (lambda: [FRAME, None], "image 2 of 2: got None"),
    "empty frame": (lambda: np.zeros((0, 640, 3), np.uint8), r"\(0, 640, 3\), which holds no pixel"),
    "empty batch": (lambda: np.zeros((0, 8, 8, 3), np.uint8), "holds no pixel"),
    "empty picture": (lambda: Image.new("RGB", (0, 5)), "0x5 pixels, expected at least one"),
    "empty bytes": (lambda: b"", "got no bytes"),
    "file at its end": (lambda: io.BytesIO(), "Is the file at its end"),
    "bytes of no image": (lambda: b"hello", "not an image that Pillow can read"),
    "masked": (masked, r"masked array.*array.filled\(0\)"),
    "channels first": (lambda: FRAME.transpose(2, 0, 1), r"channels first.*array.transpose\(1, 2, 0\)"),
    "batch, channels first": (lambda: FRAME.transpose(2, 0, 1)[None], r"channels first.*array.transpose\(0, 2, 3, 1\)"),
    "ambiguous": (lambda: np.zeros((3, 64, 3), np.uint8), r"may be \(3, H, W\) as well as \(H, W, 3\)"),
    "ambiguous batch": (lambda: np.zeros((2, 3, 64, 3), np.uint8), "as well as"),
    "four channels": (lambda: np.zeros((8, 8, 4), np.uint8), r"Drop alpha: array\[..., :3\]"),
    "float": (lambda: FRAME / np.float32(255), r"float32 .*expected uint8 with values 0-255.*round\(\)"),
    "16 bit": (lambda: FRAME.astype(np.uint16), "uint16"),
    "objects": (lambda: np.array([FRAME, None], dtype=object), "Hand images of several sizes over as a list"),
    "a vector": (lambda: np.zeros(7, np.uint8), r"uint8 \(7,\), expected \(H, W, 3\)"),
    "a number": (lambda: 7, "got int, expected a path"),
    "a dictionary": (lambda: {"image": FRAME}, "got dict, expected a path"),
    "a nested list": (lambda: [[FRAME]], "got list, expected a path"),
    "on a GPU": (OnDevice, "reads host memory only; got OnDevice on a GPU"),
    "a URL": (lambda: URL, f"got the URL {URL}, expected a file or a folder on this machine"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_values_than_images_are_refused_with_the_reason(extractor, kind):
    make, fragment = REFUSED[kind]
    with pytest.raises(PhregError, match=fragment):
        extractor(make())


def test_batches_without_pixels_are_refused_as_well(extractor):
    for call in (extractor.dense, extractor.run):
        for batch in (np.zeros((1, 0, 64, 3), np.uint8), None, np.ma.zeros((1, 64, 64, 3), np.uint8), [FRAME]):
            with pytest.raises(PhregError, match="extract: got"):
                call(batch)


def test_a_picture_that_pillow_cannot_finish_is_refused(extractor, odd_images):
    with Image.open(odd_images / "truncated.jpg") as picture, pytest.raises(PhregError, match="cannot be decoded"):
        extractor(picture)
