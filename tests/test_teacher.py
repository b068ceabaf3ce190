import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from phreg_deploy.artifacts.measures import agreement, outlier_mask
from phreg_deploy.distill.teacher import TargetCache, Teacher, mean_of_views
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.images.views import View, draw_views, gather, most_views, realign, seed_of, show
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from tests.small_models import plant, small


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    model = small("augreg", side=5)
    return read_photographs(folder, tuple(model.patch_embed.img_size), model_preprocess(model, "center"))


def test_a_reader_that_stops_after_the_last_target_has_counted_all(photographs):
    """As the bar of ``scoring`` does; it stayed below its end."""
    model, counted = small("augreg", side=5), []
    targets = Teacher(model, model_preprocess(model), views=6).targets(photographs.subset(range(3)), counted.append)
    assert len(list(itertools.islice(targets, 3))) == sum(counted) == 3


def test_the_target_is_the_mean_over_views(photographs):
    model = small("augreg", side=5)
    preprocess = model_preprocess(model)
    (target,) = Teacher(model, preprocess, views=6, seed=3).targets(photographs.subset([1]))
    total, count = np.zeros((5, 5, 48)), np.zeros((5, 5))
    for view in draw_views(6, (5, 5), seed_of(3, photographs.digests[1])):
        image = show(photographs.array(1), view, (16, 16))
        with torch.no_grad():
            features = hooks.forward(model, hooks.normalise(np.array(image)[None], preprocess.mean, preprocess.std))
        part, place = realign(features.patches[0].reshape(5, 5, -1).numpy(), view)
        total[place] += part
        count[place] += 1
    np.testing.assert_allclose(target.patches, total / count[..., None], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for cls, image in zip(target.cls, (photographs.array(1), photographs.array(1)[:, ::-1])):
            features = hooks.forward(model, hooks.normalise(np.array(image)[None], preprocess.mean, preprocess.std))
            np.testing.assert_allclose(cls, features.cls[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grid", [(5, 5), (4, 7), (14, 9)])
def test_the_mean_in_torch_is_the_mean_in_numpy(grid):
    """Against the definition: for each patch (y, x), the mean of its features in all views that show it."""
    views = draw_views(min(12, most_views(grid)), grid, seed=1)
    assert any(view.flip for view in views)
    maps = np.random.default_rng(0).normal(size=(len(views), *grid, 3)).astype(np.float32)
    expected = np.zeros((*grid, 3))
    for y, x in np.ndindex(*grid):
        shown = [(v, y - view.down, x - view.right, view.flip) for v, view in enumerate(views)]
        values = [
            maps[v, row, grid[1] - 1 - column if flip else column]
            for v, row, column, flip in shown
            if 0 <= row < grid[0] and 0 <= column < grid[1]
        ]
        expected[y, x] = np.mean(values, axis=0, dtype=np.float64)
    mean = mean_of_views(torch.from_numpy(maps), views)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-5, atol=1e-6)
    total, count = gather(maps, views)
    np.testing.assert_allclose(mean.numpy(), total / count[..., None], rtol=1e-5, atol=1e-6)


def test_one_view_is_its_own_mean():
    maps = torch.randn(1, 3, 4, 2)
    assert torch.equal(mean_of_views(maps, [View(0, 0, False)]), maps[0])


def test_only_means_and_unshifted_views_are_copied_to_the_host(photographs, monkeypatch):
    model = small("augreg", side=5)
    teacher, shapes, real = Teacher(model, model_preprocess(model), views=6), [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: shapes.append(tuple(tensor.shape)) or real(tensor))
    assert len(list(teacher.targets(photographs.subset(range(3))))) == 3
    assert sorted(shapes) == [(3, 2, 48), (3, 5, 5), (3, 5, 5, 48), (3, 5, 5, 48)]


def test_averaging_removes_a_planted_artifact(photographs):
    """The planted outlier stays in place while the image shifts, so other views show the hidden patch."""
    model = plant(small("augreg", side=5))
    targets = list(Teacher(model, model_preprocess(model), views=10).targets(photographs))
    plain, denoised, norms = (np.stack([getattr(t, name) for t in targets]) for name in ("plain", "patches", "norms"))
    outliers = outlier_mask(norms, float(np.median(norms)))
    assert outliers[:, 0, 0].all()
    on, off = agreement(plain, denoised, outliers).chosen, agreement(plain, denoised, ~outliers).chosen
    assert on < off - 0.1


def test_the_cache_computes_each_target_once_and_a_damaged_one_again(photographs, tmp_path):
    model = small("augreg", side=5)
    cache = TargetCache(Teacher(model, model_preprocess(model), views=3), tmp_path)
    assert cache.fill(photographs.subset(range(4))) == 4
    assert cache.fill(photographs) == 2
    assert cache.fill(photographs) == 0
    cache.path(photographs.digests[2]).write_bytes(b"cut short")
    assert cache.fill(photographs) == 1
    item = cache.read(photographs.digests[2])
    assert item["patches"].dtype == np.float16
    np.testing.assert_array_equal(item["image"], photographs.array(2))
    assert all(path.suffix == ".safetensors" for path in cache.folder.iterdir())


def test_other_settings_have_another_cache(tmp_path):
    model, preprocess = small("augreg", side=5), model_preprocess(small("augreg", side=5))
    digests = {
        Teacher(m, preprocess, views=v, seed=s).digest
        for m, v, s in ((model, 3, 0), (model, 4, 0), (model, 3, 1), (small("augreg", side=5, seed=1), 3, 0))
    }
    assert len(digests) == 4
    assert json.dumps(sorted(digests))
