import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.images.views import View, draw_views, gather, most_views, realign, seed_of, show


def coordinates(grid):
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    return np.stack([rows, columns], -1)


@pytest.mark.parametrize("view", [View(0, 0, False), View(2, -1, False), View(-2, 2, True), View(0, 1, True)])
def test_realigned_patches_come_from_where_they_are_put(view):
    """Each pixel of the image contains the position of its patch, so that its place in a view can be checked."""
    grid, patch = (5, 6), 4
    image = np.repeat(np.repeat(coordinates(grid), patch, 0), patch, 1)
    image = np.concatenate([image, np.zeros_like(image[..., :1])], -1).astype(np.uint8)
    shown = show(image, view, (patch, patch))
    features = shown[::patch, ::patch, :2].astype(np.float32)
    part, place = realign(features, view)
    np.testing.assert_array_equal(part, coordinates(grid)[place])


def test_the_gap_is_white():
    shown = show(np.zeros((8, 8, 3), np.uint8), View(1, 0, False), (4, 4))
    assert (shown[4:] == 255).all()
    assert (shown[:4] == 0).all()


def test_views_start_plain_stay_in_reach_and_follow_the_seed():
    views = draw_views(10, (14, 14), seed=3)
    assert views[0] == View(0, 0, False)
    assert len(views) == 10
    assert max(abs(v.down) for v in views) == 2  # 0.15 * 14, rounded
    assert views == draw_views(10, (14, 14), seed=3)
    assert views != draw_views(10, (14, 14), seed=4)
    assert len({(v.down, v.right) for v in views}) == 10  # farthest apart: no offset twice


A, B, C = seed_of(0, "a"), seed_of(12345, "b"), seed_of(0, "c")
# (grid, count, seed) -> (down, right, flip) of each view. Cached targets and published figures depend on them.
RECORDED = {
    ((14, 14), 10, 0): [
        (0, 0, 0), (-2, -2, 1), (-2, 2, 0), (2, -2, 0), (2, 2, 1), (0, 2, 0), (0, -2, 1), (-2, 0, 0), (2, 0, 1),
        (1, 1, 0),
    ],
    ((14, 14), 10, 3): [
        (0, 0, 0), (2, -2, 0), (-2, 2, 0), (-2, -2, 1), (2, 2, 1), (2, 0, 0), (0, -2, 1), (0, 2, 0), (-2, 0, 1),
        (1, 1, 1),
    ],
    ((14, 14), 10, A): [
        (0, 0, 0), (-2, 2, 1), (2, -2, 0), (-2, -2, 0), (2, 2, 1), (0, 2, 0), (2, 0, 1), (-2, 0, 1), (0, -2, 0),
        (-1, -1, 0),
    ],
    ((14, 14), 20, B): [
        (0, 0, 0), (2, 2, 1), (2, -2, 0), (-2, -2, 0), (-2, 2, 1), (-2, 0, 1), (0, 2, 0), (2, 0, 0), (0, -2, 1),
        (-1, -1, 1), (1, 1, 0), (-1, 1, 1), (1, -1, 0), (-1, 2, 1), (2, -1, 0), (-1, -2, 0), (1, 0, 1), (-2, -1, 1),
        (-1, 0, 0), (0, 1, 1),
    ],
    ((37, 37), 10, C): [
        (0, 0, 0), (-6, 6, 1), (-6, -5, 0), (6, -4, 0), (5, 5, 0), (1, -5, 1), (-5, 1, 0), (-1, 5, 0), (4, 1, 0),
        (-3, -2, 0),
    ],
    ((30, 40), 10, 5): [
        (0, 0, 0), (4, -6, 0), (-4, -6, 1), (4, 6, 0), (-3, 6, 1), (4, 1, 1), (-4, 1, 0), (2, -3, 1), (-1, -4, 0),
        (0, 5, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_views_are_those_of_earlier_versions(case):
    grid, count, seed = case
    assert draw_views(count, grid, seed) == [View(y, x, bool(flip)) for y, x, flip in RECORDED[case]]


@pytest.mark.parametrize(
    ("grid", "count"), [((7, 7), 10), ((7, 7), 18), ((4, 4), 18), ((14, 14), 50), ((7, 14), 30), ((37, 37), 338)]
)
def test_views_differ_as_long_as_others_are_left(grid, count):
    """A grid of 7 x 7 has 9 offsets, each of them plain and mirrored."""
    for seed in range(5):
        views = draw_views(count, grid, seed)
        assert len(set(views)) == len(views) == count
        offsets = {(v.down, v.right) for v in views}
        assert len(offsets) == min(count, most_views(grid) // 2)  # an offset comes back mirrored, once all are taken


def test_more_views_than_differ_are_refused():
    assert most_views((7, 7)) == 18
    with pytest.raises(
        PhregError, match=r"got 19, but on a grid of 7 x 7 patches only 18 views differ; give at most 18"
    ):
        draw_views(19, (7, 7), seed=0)


def test_gather_counts_the_views_that_cover_each_patch():
    views = [View(0, 0, False), View(1, 0, False), View(-1, 0, True)]
    total, count = gather(np.ones((3, 3, 3, 2), np.float32), views)
    np.testing.assert_array_equal(count, [[2, 2, 2], [3, 3, 3], [2, 2, 2]])
    np.testing.assert_array_equal(total[..., 0], count)


def test_an_images_views_do_not_depend_on_its_company():
    assert seed_of(0, "a") == seed_of(0, "a")
    assert seed_of(0, "a") != seed_of(0, "b")
    assert seed_of(0, "a") != seed_of(1, "a")
