"""Sheets of pictures and keys of classes: their sizes, their order and what is left out."""

import numpy as np
from PIL import Image

from phreg_deploy.images.overlays import KEY_LINE, KEY_LINES, class_key, voc_colours
from phreg_deploy.images.pictures import GROUND, sheet


def swatches(key):
    """The colours of a key's lines, from the top; the ground where a line has none."""
    pixels = np.asarray(key)
    return [tuple(int(level) for level in pixels[y + KEY_LINE // 2, 6]) for y in range(0, key.height, KEY_LINE)]


def test_a_key_names_the_classes_that_occur_the_commonest_first():
    labels = np.array([[2, 2, 2], [0, 0, 255]], np.uint8)
    colours = [(10, 20, 30), (1, 1, 1), (200, 100, 0)]
    assert swatches(class_key(labels, ("sky", "road", "Grün→"), colours)) == [colours[2], colours[0]]
    # An overlay's colours are those of the classes over the image, which is grey in a key.
    assert swatches(class_key(labels, ("a", "b", "c"), colours, shade=0.5)) == [(164, 114, 64), (69, 74, 79)]


def test_a_key_without_colours_has_those_of_pascal_voc():
    labels = np.repeat(np.arange(40), np.arange(40, 0, -1)).astype(np.uint8)[None]
    key = class_key(labels, [str(k) for k in range(40)])
    shown = swatches(key)
    assert shown[: KEY_LINES - 1] == list(voc_colours()[: KEY_LINES - 1])
    assert shown[KEY_LINES - 1 :] == [GROUND]
    assert key.height == KEY_LINES * KEY_LINE


def test_a_sheet_is_as_high_as_its_pictures():
    wide, tall = Image.new("RGB", (100, 25), (1, 2, 3)), Image.new("RGB", (50, 100), (9, 8, 7))
    page = sheet([[("wide", wide), ("again", wide)], [("tall", tall)]], side=200)
    assert page.size == (2 * 212 + 12, 12 + (20 + 50 + 12) + (20 + 200 + 12))
    pixels = np.asarray(page)
    assert tuple(pixels[32, 12]) == tuple(pixels[81, 423]) == (1, 2, 3)
    assert tuple(pixels[114, 12]) == tuple(pixels[313, 111]) == (9, 8, 7)
    assert tuple(pixels[82, 12]) == tuple(pixels[314, 12]) == GROUND
