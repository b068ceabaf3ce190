"""Files of images of any mode, and pixels that equal timm's evaluation transform bit for bit."""

import math
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.decoding import LARGEST_SIDE, read_image, to_rgb
from phreg_deploy.images.photographs import fit, list_images, read_fitted, read_photographs
from phreg_deploy.images.resampling import applies
from phreg_deploy.spec import Preprocess
from tests.cli_helpers import photograph

HALF = (0.5, 0.5, 0.5)
PLAIN = Preprocess(HALF, HALF, "bicubic", "squash", 1.0)
READABLE = ("cmyk.jpg", "grey.png", "grey16.png", "palette.png", "rgba.png", "whole.jpg")
UNREADABLE = ("empty.png", "text.jpg", "truncated.jpg")


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean absolute difference in grey levels."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


@pytest.mark.parametrize("name", READABLE)
def test_every_mode_becomes_rgb_of_the_same_scene(odd_images, name):
    image = read_image(odd_images / name)
    assert (image.mode, image.size) == ("RGB", (90, 80))
    truth = photograph(100, 90, 80)
    grey = name.startswith("grey")
    expected = np.asarray(truth.convert("L").convert("RGB") if grey else truth)
    # JPEG, CMYK and a palette of 256 colours lose a little; grey and alpha lose nothing
    assert mean_difference(np.asarray(image), expected) <= (
        8 if name in ("cmyk.jpg", "palette.png", "whole.jpg") else 0
    )


def test_16_bit_grey_uses_its_full_range():
    ramp = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(ramp.astype(np.int32))))[0, :, 2].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I;16B"])
def test_every_mode_of_pillow_is_read(mode):
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
        ("", "is a folder; expected an image file"),
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
    monkeypatch.setattr("phreg_deploy.images.photographs.KEEP_BYTES", 0)
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


def test_a_listing_follows_links_to_folders_and_ends(tmp_path):
    inside, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    elsewhere.mkdir()
    inside.mkdir()
    (inside / "a.png").touch()
    (elsewhere / "b.png").touch()
    (inside / "far").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(inside)
    (inside / "self").symlink_to(inside)
    (inside / "gone.png").symlink_to(tmp_path / "missing.png")
    assert [str(p.relative_to(inside)) for p in list_images(inside)] == ["a.png", "far/b.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    from phreg_deploy.images import photographs

    (tmp_path / "closed").mkdir()
    real = photographs.os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(photographs.os, "scandir", refuse)
    with pytest.raises(PhregError, match=r"closed cannot be read \(Permission denied\)"):
        list_images(tmp_path)


SOURCES = [(640, 480), (479, 640), (225, 225), (151, 467), (521, 257), (240, 320), (101, 97), (224, 224)]


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (240, 320)])
@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_fit_equals_timms_transform_bit_for_bit(torch, crop_mode, size, interpolation, crop_pct):
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


def test_center_crops_the_edges_and_squash_keeps_them():
    image = np.zeros((100, 300, 3), dtype=np.uint8)
    image[:, :60] = 255  # a mark at the left edge of a wide image
    wide = Image.fromarray(image)
    assert fit(wide, (50, 50), PLAIN)[:, :8].min() == 255
    assert fit(wide, (50, 50), Preprocess(HALF, HALF, "bicubic", "center", 1.0)).max() == 0


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_an_image_of_the_right_size_is_left_alone(interpolation):
    image = photograph(5, 40, 32)
    assert np.array_equal(fit(image, (32, 40), Preprocess(HALF, HALF, interpolation, "squash", 1.0)), np.asarray(image))


def test_an_image_of_one_pixel_is_read():
    found = fit(Image.new("RGB", (1, 1), (9, 8, 7)), (24, 40), PLAIN)
    assert found.reshape(-1, 3).tolist() == [[9, 8, 7]] * (24 * 40)
    assert math.prod(found.shape) == 24 * 40 * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_where_the_preprocessing_says_so(tmp_path, orientation):
    scene = photograph(5, 40, 24)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Pillow's transposes
    stored, tag = scene if undo is None else scene.transpose(Image.Transpose(undo)), Image.Exif()
    tag[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=tag)
    turned = replace(PLAIN, exif=True)
    assert np.array_equal(read_fitted(tmp_path / "turned.png", (24, 40), turned), np.asarray(scene))
    assert np.array_equal(read_fitted(tmp_path / "turned.png", (24, 40), PLAIN), fit(stored, (24, 40), PLAIN))
    found = read_photographs(tmp_path, (24, 40), turned)
    assert np.array_equal(found.array(0), np.asarray(scene))


def test_a_large_jpeg_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch):
    scene = photograph(6, 400, 320)
    scene.save(tmp_path / "large.jpg", quality=95)
    monkeypatch.setattr("phreg_deploy.images.decoding.GIANT", 400 * 320 // 4)
    small = read_image(tmp_path / "large.jpg")
    assert small.size == (200, 160)
    assert mean_difference(np.asarray(small), np.asarray(scene.reduce(2))) < 3
    monkeypatch.setattr("phreg_deploy.images.decoding.GIANT", 400 * 320)
    assert read_image(tmp_path / "large.jpg").size == (400, 320)


@pytest.mark.parametrize("limit", [3_999, 1_000])  # the second is so low that Pillow refuses to open the file
def test_an_image_above_the_limit_is_called_large_and_not_damaged(tmp_path, monkeypatch, limit):
    photograph(7, 80, 50).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(PhregError, match=r"too large .* it is not damaged"):
        read_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(tmp_path / "large.png").size == (80, 50)


@pytest.mark.parametrize("size", [(1, LARGEST_SIDE + 1), (LARGEST_SIDE + 1, 1)])
def test_a_side_of_millions_of_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    Image.new("1", size).save(tmp_path / "line.png")
    with pytest.raises(PhregError, match=rf"has {size[0]}x{size[1]} pixels, too long and narrow"):
        read_image(tmp_path / "line.png")


def test_16_bit_grey_takes_little_memory():
    """A whole image in float64 would take 8 bytes a pixel, several times."""
    image = Image.fromarray(np.arange(1 << 22, dtype=np.uint16).reshape(2048, 2048))
    tracemalloc.start()
    try:
        to_rgb(image)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 6 << 22


def test_postscript_runs_no_other_program(tmp_path, monkeypatch):
    """Pillow would start Ghostscript, whatever the name of the file."""
    ghost = tmp_path / "gs"
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path}/it-ran\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(PhregError, match="is EPS, which another program reads"):
        read_image(tmp_path / "a.png")
    assert not (tmp_path / "it-ran").exists()


def test_an_image_as_thin_as_a_hair_is_refused_before_it_is_enlarged():
    thin = Image.new("RGB", (2, 4_000))
    with pytest.raises(PhregError, match="got 2x4000 pixels, too long and narrow for 32x32"):
        fit(thin, (32, 32), Preprocess(HALF, HALF, "bicubic", "center", 1.0))
    assert fit(thin, (32, 32), PLAIN).shape == (32, 32, 3)


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [(224, 224), (160, 240)])
def test_the_fast_resize_gives_pillows_numbers(crop_mode, interpolation, size):
    exact = Preprocess(HALF, HALF, interpolation, crop_mode, 0.9 if crop_mode == "center" else 1.0)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (720, 1100, 3), dtype=np.uint8)
    edges = np.kron(rng.integers(0, 2, (72, 110, 3), dtype=np.uint8) * 255, np.ones((10, 10, 1), np.uint8))
    for frame in (noise, edges, np.asarray(photograph(8, 1100, 720))):
        expected = fit(Image.fromarray(frame), size, exact).astype(int)
        for image in (frame, Image.fromarray(frame)):
            difference = np.abs(fit(image, size, replace(exact, fast=True)) - expected)
            assert difference.max() <= 1
            assert (
                frame is edges or np.mean(difference > 0) <= 5e-4
            )  # edges of 0 and 255 give sums that end in one half
    assert applies((1100, 720), (224, 224), interpolation) == (interpolation in ("bicubic", "lanczos"))


def test_small_images_are_resized_by_pillow():
    assert not applies((640, 480), (224, 224), "bicubic")
    assert not applies((1920, 1080), (1920, 500), "bicubic")


def test_preprocessing_that_was_stored_before_exif_keeps_its_behaviour():
    stored = PLAIN.to_json()
    assert (stored.pop("exif"), stored.pop("fast")) == (False, False)
    assert Preprocess.from_json(stored) == PLAIN
    with pytest.raises(PhregError, match="exif: got 1, expected true or false"):
        Preprocess.from_json(stored | {"exif": 1})
    with pytest.raises(PhregError, match="got the keys"):
        Preprocess.from_json(stored | {"turn": True})
