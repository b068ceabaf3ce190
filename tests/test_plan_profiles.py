"""Optimization profiles of a bundle: the shapes that each holds, for fixed, listed and ranged sizes."""

import dataclasses
import json

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import ProfileShapes, profiles_of
from phreg_deploy.spec import Batches, Sizes

pytestmark = pytest.mark.usefixtures("torch")


def test_a_fixed_bundle_has_one_profile_of_one_shape(bundle_copy):
    assert [p.inputs for p in profiles_of(bundle_copy.manifest)] == [{"image": [[1, 64, 64, 3]] * 3}]


def test_a_range_of_sizes_has_a_profile_for_single_images_and_one_for_batches(world):
    manifest = Bundle.read(world.wide_bundle).manifest
    single, profile = profiles_of(manifest)
    # Single images have a separate profile.
    assert single.inputs["image"] == [[1, 48, 48, 3], [1, 64, 64, 3], [1, 96, 96, 3]]
    assert profile.inputs == {
        "image": [[1, 48, 48, 3], [2, 64, 64, 3], [4, 96, 96, 3]],
        "pos_embed": [[1, 36, 48], [1, 64, 48], [1, 144, 48]],
    }
    assert profile.holds({"image": (4, 48, 96, 3), "pos_embed": (1, 72, 48)})
    for shapes in ({"image": (5, 64, 64, 3)}, {"image": (1, 40, 64, 3)}, {"image": (1, 64, 104, 3)}):
        assert not profile.holds({"pos_embed": (1, 64, 48), **shapes}), shapes
    assert not profile.holds({"image": (1, 64, 64, 3), "pos_embed": (1, 145, 48)})


def test_a_list_of_sizes_has_profiles_for_each_size(world):
    manifest = Bundle.read(world.wide_bundle).manifest
    sizes = Sizes.parse("48x96,64", (8, 8))
    listed = dataclasses.replace(manifest, sizes=sizes, batches=Batches(1, 3, 8))
    *single, first, second = profiles_of(listed)
    assert [p.inputs["image"][1] for p in single] == [[1, 48, 96, 3], [1, 64, 64, 3]]
    assert first.inputs == {
        "image": [[1, 48, 96, 3], [3, 48, 96, 3], [8, 48, 96, 3]],
        "pos_embed": [[1, 72, 48]] * 3,
    }
    assert second.inputs["image"][1] == [3, 64, 64, 3]
    assert first.holds({"image": (8, 48, 96, 3)})
    assert not first.holds({"image": (8, 64, 64, 3)})
    assert ProfileShapes.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("shapes", [{"image": (1, 64)}, {"image": (1, 64, 64, 3, 1)}, {"imago": (1, 64, 64, 3)}])
def test_a_shape_of_another_rank_or_name_is_not_held(bundle_copy, shapes):
    assert not profiles_of(bundle_copy.manifest)[0].holds(shapes)
