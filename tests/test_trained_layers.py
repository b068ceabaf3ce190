"""``distill --layers``: targets of further layers, the loss on them, the cache, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from phreg_deploy.artifacts.measures import cosine
from phreg_deploy.distill import distill
from phreg_deploy.distill.objective import TargetScale, objective
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.distill.teacher import TargetCache, Teacher
from phreg_deploy.distill.training_batches import load_batch, split_batch
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import load_model, model_preprocess
from tests.small_models import small


@pytest.fixture(scope="module")
def targets(photos, tmp_path_factory):
    """The targets of a model of three blocks, with layers 1 and 2, for three photographs."""
    model = small("dinov2", depth=3)
    preprocess = model_preprocess(model, "center")
    photographs = read_photographs(photos, tuple(model.patch_embed.img_size), preprocess, 3)
    cache = TargetCache(Teacher(model, preprocess, views=4, layers=(1, 2)), tmp_path_factory.mktemp("cache"))
    assert cache.fill(photographs) == 3
    return model, preprocess, photographs, cache


def test_a_layer_is_denoised_as_a_model_that_ends_there(targets):
    model, preprocess, photographs, cache = targets
    short = small("dinov2", depth=3)
    short.blocks = short.blocks[:2]
    alone = list(Teacher(short, preprocess, views=4).targets(photographs))
    for digest, target in zip(photographs.digests, alone):
        stored = cache.read(digest)["layers"]
        assert stored.shape == (2, 16, 48)
        np.testing.assert_allclose(stored[1].astype(np.float32), target.patches.reshape(16, 48), rtol=2e-3, atol=2e-3)
    plain = Teacher(model, preprocess, views=4)
    assert plain.digest != cache.teacher.digest
    assert TargetCache(plain, cache.folder.parent).folder != cache.folder


def test_a_damaged_layer_is_noticed(targets, tmp_path):
    _, _, photographs, cache = targets
    moved = TargetCache(cache.teacher, tmp_path)
    moved.folder.mkdir()
    data = bytearray(cache.path(photographs.digests[0]).read_bytes())
    item = cache.read(photographs.digests[0])["layers"].tobytes()
    data[bytes(data).index(item) + 7] ^= 1
    moved.path(photographs.digests[0]).write_bytes(data)
    with pytest.raises(Exception, match="is damaged"):
        moved.read(photographs.digests[0])


def test_mirrored_layers_are_those_of_mirrored_patches(targets):
    _, _, photographs, cache = targets
    straight, mirrored = (load_batch(cache, photographs.digests, np.full(3, flip)) for flip in (False, True))
    grid = straight.layers.reshape(3, 2, 4, 4, 48)
    assert torch.equal(mirrored.layers.reshape(3, 2, 4, 4, 48), grid.flip(3))
    assert torch.equal(mirrored.patches.reshape(3, 4, 4, 48), straight.patches.reshape(3, 4, 4, 48).flip(2))


def test_the_loss_adds_the_mean_over_the_layers(targets):
    model, preprocess, photographs, cache = targets
    recipe = replace(RECIPES["transplant"], layers=(1, 2), layer_weight=3.0, norm_weight=0.0, class_weight=0.0)
    batch = load_batch(cache, photographs.digests, np.zeros(3, bool))
    (part,) = split_batch(batch, recipe, None, 1)
    part = part.to("cpu")
    images = hooks.normalise(part.images, preprocess.mean, preprocess.std)
    with torch.no_grad():
        features = hooks.forward(model, images, recipe.layers)
        scale = TargetScale(1.0, 1.0, None, (2.0, 4.0))
        got = objective(features, part, recipe, scale)
        part.layers = None
        without = objective(features, part, recipe, scale)
    expected = []
    for i, variance in enumerate((2.0, 4.0)):
        target = batch.layers[:, i].float()
        error = (part.weight * (features.layers[i] - target).square().mean(-1)).mean() / variance
        away = (part.weight * (1 - torch.cosine_similarity(features.layers[i], target, dim=-1))).mean()
        expected.append(error + away)
    torch.testing.assert_close(got - without, 3.0 * sum(expected) / 2)


def test_training_brings_the_layers_closer_to_their_targets(base, photos, tmp_path):
    settings = {"epochs": 3, "batch": 4, "views": 4, "device": "cpu", "precision": "fp32", "lr": 1e-3}
    fidelity = {}
    for name, layers in (("with", "1/3,2/3,1"), ("without", None)):
        record = distill(str(base), photos, tmp_path / name, cache=tmp_path / "cache", layers=layers, **settings)
        assert record.recipe.layers == ((1, 2) if layers else ())
        student = load_model(str(tmp_path / name))
        preprocess = model_preprocess(student, "center")
        photographs = read_photographs(photos, (64, 64), preprocess)
        kept = photographs.subset(i for i, path in enumerate(photographs.names) if path in record.images.held_out)
        kept = kept if len(kept) else photographs
        teacher = Teacher(load_model(str(base)), preprocess, views=20, seed=3, layers=(1, 2))
        wanted = np.stack([target.layers for target in teacher.targets(kept)])
        images = hooks.normalise(kept.batch(0, len(kept)), preprocess.mean, preprocess.std)
        with torch.no_grad():
            layers_of = hooks.forward(student, images, (1, 2)).layers
        fidelity[name] = [float(cosine(x.numpy(), wanted[:, i]).mean()) for i, x in enumerate(layers_of)]
    assert all(a > b for a, b in zip(fidelity["with"], fidelity["without"])), fidelity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "layers: got 9, expected numbers from 1 to 3"),
        (["--layers", "one"], "layers: got 'one'"),
        (["--layers", "3", "--readout", "value"], "layers: got 3, the last block, with the readout value"),
    ],
)
def test_layers_that_cannot_be_trained_are_refused(base, photos, run_cli, tmp_path, options, message):
    run_cli("distill", base, "--images", photos, "-o", tmp_path / "out", *options, "--json").refused(2, message)
    assert not (tmp_path / "out").exists()
