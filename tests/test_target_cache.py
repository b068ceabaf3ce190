"""Teacher targets on disk are computed once, written whole, and read by several threads at a time."""

import ast
import os
import resource
import threading
from dataclasses import replace

import numpy as np
import pytest

from phreg_deploy.images.photographs import read_photographs

pytestmark = pytest.mark.usefixtures("torch")


@pytest.fixture
def case(base, photos, tmp_path):
    """A cache of the base model's targets, and six photographs to fill it with."""
    from phreg_deploy.distill.teacher import TargetCache, Teacher
    from phreg_deploy.models.loading import load_model, model_preprocess

    model = load_model(str(base))
    preprocess = model_preprocess(model, "center")
    photographs = read_photographs(photos, (64, 64), preprocess, limit=6)
    return TargetCache(Teacher(model, preprocess, views=4), tmp_path), photographs


def test_targets_are_computed_once(case):
    cache, photographs = case
    assert cache.fill(photographs) == 6
    assert cache.fill(photographs) == 0
    item = cache.read(photographs.digests[2])
    assert {name: (value.dtype.name, value.shape) for name, value in item.items()} == {
        "image": ("uint8", (64, 64, 3)),
        "patches": ("float16", (64, 48)),
        "cls": ("float16", (2, 48)),
        "norms": ("float32", (64,)),
        "drift": ("float16", (64,)),
    }
    assert np.array_equal(item["image"], photographs.array(2))
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted(
        f"{d[:32]}.safetensors" for d in photographs.digests
    )


def test_a_target_does_not_depend_on_the_other_images_or_their_order(case):
    cache, photographs = case
    cache.fill(photographs.subset([4]))
    alone = cache.read(photographs.digests[4])
    cache.path(photographs.digests[4]).unlink()
    cache.fill(photographs.subset([5, 4, 0]))
    together = cache.read(photographs.digests[4])
    for name, value in alone.items():
        np.testing.assert_allclose(together[name].astype(np.float32), value.astype(np.float32), atol=2e-3)


def test_other_settings_have_another_folder(case):
    from phreg_deploy.distill.teacher import TargetCache, Teacher

    cache, _ = case
    teacher = cache.teacher
    others = [
        Teacher(teacher.model, teacher.preprocess, views=5),
        Teacher(teacher.model, teacher.preprocess, views=4, seed=1),
        Teacher(teacher.model, teacher.preprocess, views=4, autocast=True),
        Teacher(teacher.model, replace(teacher.preprocess, crop_mode="squash"), views=4),
        Teacher(teacher.model, replace(teacher.preprocess, exif=False), views=4),
        Teacher(teacher.model, replace(teacher.preprocess, fast=False), views=4),
    ]
    folders = {TargetCache(other, cache.folder.parent).folder for other in others}
    assert len(folders | {cache.folder}) == 1 + len(others)


def twins(**changes):
    """Make two models with the same weights, the second with other arguments."""
    from tests.small_models import small

    first = small("clip")
    second = small(changes.pop("family", "clip"), **changes)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("changes", [{"family": "clip-quickgelu"}, {"heads": 6}, {"act_layer": "quick_gelu"}], ids=str)
def test_the_same_weights_computed_otherwise_have_another_folder(photos, tmp_path, changes):
    from phreg_deploy.distill.teacher import TargetCache, Teacher
    from phreg_deploy.models.loading import model_preprocess
    from phreg_deploy.models.weights import weights_digest

    models = twins(**changes)
    assert weights_digest(models[0]) == weights_digest(models[1])
    preprocess = model_preprocess(models[0])
    photographs = read_photographs(photos, tuple(models[0].patch_embed.img_size), preprocess, limit=1)
    caches = [TargetCache(Teacher(model, preprocess, views=2), tmp_path) for model in models]
    assert caches[0].fill(photographs) == 1
    assert caches[1].fill(photographs) == 1, "the first cache is not used"
    first, second = (cache.read(photographs.digests[0])["patches"].astype(np.float32) for cache in caches)
    assert np.abs(first - second).max() > 0.015


def test_another_image_size_has_another_folder(base):
    from phreg_deploy.distill.teacher import Teacher
    from phreg_deploy.models.loading import load_model, model_preprocess

    models = [load_model(str(base)), load_model(str(base), image_size=(72, 64))]
    assert len({Teacher(model, model_preprocess(model)).digest for model in models}) == 2


def test_the_same_model_loaded_again_finds_its_targets(base):
    from phreg_deploy.distill.teacher import Teacher
    from phreg_deploy.models.loading import load_model, model_preprocess

    models = [load_model(str(base)) for _ in range(2)]
    assert len({Teacher(model, model_preprocess(model)).digest for model in models}) == 1


def other_arrays(data):
    from safetensors.numpy import save

    return save({"image": np.zeros(3, np.uint8)})


DAMAGES = {
    "head alone": lambda b: b[:300],
    "empty": lambda b: b"",
    "noise": lambda b: b"noise",
    "cut short": lambda b: b[:-200],
    "longer": lambda b: b + b"x",
    "one bit": lambda b: b[:-500] + bytes([b[-500] ^ 1]) + b[-499:],
    "zeros": lambda b: bytes(len(b)),
    "other arrays": other_arrays,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_target_is_computed_again(case, damage):
    from phreg_deploy.errors import PhregError

    cache, photographs = case
    cache.fill(photographs)
    path = cache.path(photographs.digests[1])
    whole = cache.read(photographs.digests[1])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PhregError, match=r"targets: .*\.safetensors is damaged; remove it"):
        cache.read(photographs.digests[1])
    assert cache.fill(photographs) == 1
    assert np.array_equal(cache.read(photographs.digests[1])["patches"], whole["patches"])


def test_a_write_that_fails_leaves_no_part(case):
    """The system writes the first thousand bytes of a target, and then fails."""
    from phreg_deploy.errors import PhregError

    cache, photographs = case
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(PhregError, match="cannot be written"):
            cache.fill(photographs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.folder.iterdir()) == []
    assert cache.fill(photographs) == 6


def test_two_distillations_fill_one_cache(case, monkeypatch):
    """The other one computes and writes every target between this one's write and its rename."""
    from phreg_deploy.distill.teacher import TargetCache

    cache, photographs = case
    real, rivals = os.replace, []

    def replace_late(source, target):
        if not rivals:
            rivals.append(TargetCache(cache.teacher, cache.folder.parent))
            assert rivals[0].fill(photographs) == 6
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    assert cache.fill(photographs) == 6
    assert cache.fill(photographs) == 0
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted(
        f"{d[:32]}.safetensors" for d in photographs.digests
    )


def test_two_threads_read_targets_at_once(case, monkeypatch):
    """Reading needs neither a lock nor ``ast``, which numpy parses headers with.

    ``ast`` in two threads at once can end in a SystemError, as seen on Python 3.11.7 (python/cpython#106905).
    """
    from phreg_deploy.distill.recipes import RECIPES
    from phreg_deploy.distill.training import load_batch, read_batches

    cache, photographs = case
    cache.fill(photographs)
    digests = photographs.digests * 3
    # Each thread waits for the other one.
    meeting, real = threading.Barrier(2), cache.read

    def read(digest):
        meeting.wait(timeout=120)
        return real(digest)

    def parse(text):
        raise AssertionError(f"ast parses {text}")

    recipe = replace(RECIPES["transplant"], batch=1, epochs=1, flips=False)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read", read)
        patch.setattr(ast, "literal_eval", parse)
        batches = list(read_batches(cache, digests, recipe, seed=0, epoch=0))
    order = np.random.default_rng([0, 0]).permutation(18)
    assert len(batches) == 18
    for i, batch in zip(order, batches):
        alone = load_batch(cache, [digests[i]], np.zeros(1, bool))
        for name in ("images", "patches", "cls", "drift"):
            assert np.array_equal(getattr(batch, name), getattr(alone, name))
