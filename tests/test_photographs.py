"""Files of images of any mode, and pixels that equal timm's evaluation transform bit for bit."""

import math

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.photographs import fit, list_images, read_image, read_photographs, to_rgb
from phreg_deploy.spec import Preprocess
from tests.world import photograph

HALF = (0.5, 0.5, 0.5)
PLAIN = Preprocess(HALF, HALF, "bicubic", "squash", 1.0)
READABLE = ("cmyk.jpg", "grey.png", "grey16.png", "palette.png", "rgba.png", "whole.jpg")
UNREADABLE = ("empty.png", "text.jpg", "truncated.jpg")


def close(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


@pytest.mark.parametrize("name", READABLE)
def test_every_mode_becomes_rgb_of_the_same_scene(odd_images, name):
    image = read_image(odd_images / name)
    assert (image.mode, image.size) == ("RGB", (90, 80))
    truth = photograph(100, 90, 80)
    grey = name.startswith("grey")
    expected = np.asarray(truth.convert("L").convert("RGB") if grey else truth)
    # JPEG, CMYK and a palette of 256 colours lose a little; grey and alpha lose nothing
    assert close(np.asarray(image), expected) <= (8 if name in ("cmyk.jpg", "palette.png", "whole.jpg") else 0)


def test_16_bit_grey_uses_its_full_range():
    ramp = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(ramp.astype(np.int32))))[0, :, 2].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B"])
def test_modes_of_pillow(mode):
    image = photograph(1, 20, 16).convert("L" if mode.startswith("I;16") else mode)
    grey = np.asarray(image)
    if mode.startswith("I;16"):
        deep = (grey.astype(np.uint16) * 257).astype(">u2" if mode.endswith("B") else "<u2")
        image = Image.frombytes(mode, image.size, deep.tobytes())
    assert image.mode == mode
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (20, 16))
    assert np.asarray(rgb).std() > 1
    if mode.startswith("I;16"):
        assert np.array_equal(np.asarray(rgb)[..., 0], grey)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    picture = photograph(2, 24, 24).convert("P", palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / "sprite.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "sprite.png").mode == "RGB"


@pytest.mark.parametrize(
    ("array", "fragment"),
    [
        (np.full((2, 2), 70000, dtype=np.int32), "70000"),
        (np.full((2, 2), -1, dtype=np.int32), "16-bit grey"),
        (np.full((2, 2), 0.5, dtype=np.float32), "mode 'F'"),
    ],
)
def test_pixels_without_a_scale_are_refused(array, fragment):
    with pytest.raises(PhregError, match=fragment):
        to_rgb(Image.fromarray(array))


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("empty.png", "is empty"),
        ("text.jpg", "not an image that Pillow can read"),
        ("truncated.jpg", "truncated or damaged"),
        ("nowhere.jpg", "there is no file"),
    ],
)
def test_an_unreadable_file_says_why(odd_images, name, fragment):
    with pytest.raises(PhregError, match=fragment) as caught:
        read_image(odd_images / name)
    assert str(odd_images / name) in str(caught.value)


def test_a_folder_skips_counts_and_names_what_it_cannot_read(odd_images):
    found = read_photographs(odd_images, (64, 64), PLAIN)
    assert tuple(found.names) == READABLE
    assert tuple(found.skipped) == UNREADABLE
    assert found.skip_line.startswith("Skipped 3 unreadable files")
    assert "empty.png" in found.skip_line
    assert found.batch(0, 99).shape == (6, 64, 64, 3)
    assert found.subset([2, 0]).names == ["grey16.png", "cmyk.jpg"]
    assert np.array_equal(found.subset([2, 0]).array(0), found.array(2))


def test_pixels_that_are_not_kept_are_decoded_again(photos, monkeypatch):
    kept = read_photographs(photos, (32, 32), PLAIN, limit=3)
    monkeypatch.setattr("phreg_deploy.photographs.KEEP_BYTES", 0)
    again = read_photographs(photos, (32, 32), PLAIN, limit=3)
    assert len(kept.kept) == 3
    assert not again.kept
    assert np.array_equal(kept.batch(0, 3), again.batch(0, 3))
    assert kept.digest() == again.digest()


def test_a_listing_is_sorted_and_searches_below(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/1.webp", "notes.txt", ".hidden/x.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)]
    assert names == [".hidden/x.tiff", "a.png", "b/1.webp", "b/2.JPG"]
    assert len(list_images(tmp_path, 2)) == 2


SOURCES = [(640, 480), (479, 640), (225, 225), (151, 467), (521, 257), (240, 320), (101, 97), (224, 224)]


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (240, 320)])
@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_fit_is_timms_transform_bit_for_bit(torch, crop_mode, size, interpolation, crop_pct):
    from timm.data import create_transform

    whole = create_transform(
        (3, *size), interpolation=interpolation, mean=HALF, std=HALF, crop_pct=crop_pct, crop_mode=crop_mode
    )
    names = [type(step).__name__ for step in whole.transforms]
    on_pixels = whole.transforms[: names.index("MaybeToTensor")]
    preprocess = Preprocess(HALF, HALF, interpolation, crop_mode, crop_pct)
    for source in SOURCES:
        image = photograph(sum(source), *source)
        expected = image
        for step in on_pixels:
            expected = step(expected)
        got = fit(image, size, preprocess)
        assert got.shape == (*size, 3)
        assert np.array_equal(got, np.asarray(expected)), f"{source} differs"
        # and through the whole transform, up to the rounding of its own normalisation
        back = whole(image).permute(1, 2, 0).numpy() * 0.5 + 0.5
        assert np.array_equal(np.rint(255 * back).astype(np.uint8), got)


def test_center_crops_and_squash_keeps():
    image = np.zeros((100, 300, 3), dtype=np.uint8)
    image[:, :60] = 255  # a mark at the left edge of a wide image
    wide = Image.fromarray(image)
    assert fit(wide, (50, 50), PLAIN)[:, :8].min() == 255
    assert fit(wide, (50, 50), Preprocess(HALF, HALF, "bicubic", "center", 1.0)).max() == 0


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_an_image_of_the_right_size_is_left_alone(interpolation):
    image = photograph(5, 40, 32)
    assert np.array_equal(fit(image, (32, 40), Preprocess(HALF, HALF, interpolation, "squash", 1.0)), np.asarray(image))


def test_one_pixel_is_enough():
    found = fit(Image.new("RGB", (1, 1), (9, 8, 7)), (24, 40), PLAIN)
    assert found.reshape(-1, 3).tolist() == [[9, 8, 7]] * (24 * 40)
    assert math.prod(found.shape) == 24 * 40 * 3
