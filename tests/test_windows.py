"""Windows over images of any size: their places, their weights and what they cut out."""

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.windows import Windows, check_stride, cut
from phreg_deploy.spec import Preprocess
from tests.cli_helpers import photograph

STEPS = Preprocess((0.5, 0.25, 0.75), (0.5,) * 3, "bicubic", "center", 0.9)
MEAN = [128, 64, 191]


@pytest.mark.parametrize("height", [1, 8, 40, 63, 64, 65, 200, 331])
@pytest.mark.parametrize("stride", [8, 24, 31, 64])
def test_windows_cover_every_patch_and_their_weights_sum_to_one(height, stride):
    windows = Windows.over((height, 100), (64, 48), (stride, 24), (8, 8))
    assert windows.grid == (-(-height // 8), 13)
    total = np.zeros(windows.grid)
    rows, columns = windows.weights()
    for number, start in enumerate(windows):
        inside = windows.inside(start)
        h, w = (part.stop - part.start for part in inside)
        down, across = divmod(number, len(windows.columns))
        total[inside] += rows[down][:h, None] * columns[across][:w]
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert np.diff(windows.rows).max(initial=0) <= stride // 8
    assert np.ptp(np.diff(windows.rows)).max(initial=0) <= 1 if len(windows.rows) > 2 else True
    assert len(windows.rows) == 1 + -(-max(0, windows.grid[0] - 8) // (stride // 8)), "more windows than needed"


def test_borders_of_a_window_weigh_least():
    row = Windows.over((320, 64), (64, 64), (32, 64), (8, 8)).weights()[0][3]
    assert row.argmin() in (0, 7)
    assert row[0] < 0.05
    assert row[3:5].min() > 0.8


@pytest.mark.parametrize("stride", [(7, 32), (32, 65), (0, 32)])
def test_a_stride_outside_a_patch_to_a_window_is_refused(stride):
    with pytest.raises(PhregError, match=r"stride: got .*expected from a patch, 8x8, to the window, 64x64"):
        check_stride(stride, (64, 64), (8, 8))


@pytest.mark.parametrize("kind", ["array", "picture"])
def test_what_lies_outside_the_image_is_the_mean_colour(kind):
    picture = photograph(3, 40, 21)
    array = np.asarray(picture)
    windows = Windows.over((21, 40), (64, 48), (32, 24), (8, 8))
    (start,) = windows
    got = cut(array if kind == "array" else picture, windows, start, STEPS, bgr=False)
    assert np.array_equal(got[:21, :40], array)
    assert np.array_equal(got[21:24, :40], np.broadcast_to(array[20], (3, 40, 3))), "begun patches repeat the border"
    assert (got[24:] == MEAN).all()
    assert (got[:, 40:] == MEAN).all()


def test_bgr_windows_are_turned_and_padding_is_not():
    array = np.asarray(photograph(4, 70, 30))
    windows = Windows.over((30, 70), (48, 48), (24, 24), (8, 8))
    for start in windows:
        right = cut(Image.fromarray(array), windows, start, STEPS, bgr=False)
        assert np.array_equal(cut(array[..., ::-1], windows, start, STEPS, bgr=True), right)
