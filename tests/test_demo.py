import json

import numpy as np
import pytest
import torch

from phreg_deploy.artifacts.measures import agreement, outlier_mask
from phreg_deploy.demo.linear_probe import LinearProbe, mean_iou, patch_labels
from phreg_deploy.demo.pipeline import MODEL
from phreg_deploy.demo.scenes import CLASSES, make_scene, write_scenes
from phreg_deploy.distill.neurons.search import find_register_neurons
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import load_model, model_preprocess


def test_a_scene_follows_its_seed():
    image, labels = make_scene(5)
    again, _ = make_scene(5)
    np.testing.assert_array_equal(image, again)
    assert image.shape == (128, 128, 3)
    assert image.dtype == labels.dtype == np.uint8
    assert labels.shape == (128, 128)
    assert labels.max() < len(CLASSES)
    assert (make_scene(6)[0] != image).any()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, range(8))
    return read_photographs(folder, (128, 128), model_preprocess(load_model(str(MODEL))))


def test_the_embedded_model_has_the_artifacts_it_claims(scenes):
    """The search finds a register neuron, whose outlier tokens lack the content that other views still show."""
    assert (MODEL / "model.safetensors").stat().st_size < 5 * 2**20
    model = load_model(str(MODEL))
    preprocess = model_preprocess(model)
    search = find_register_neurons(model, [hooks.normalise(scenes.batch(0, 8), preprocess.mean, preprocess.std)])
    assert len(search.neurons) >= 1
    assert 0.005 < search.rate < 0.05
    assert max(search.block_largest) > 10
    targets = list(Teacher(model, preprocess, views=10).targets(scenes))
    norms = np.stack([t.norms for t in targets])
    outliers = outlier_mask(norms, float(np.median(norms)))
    fidelity = agreement(np.stack([t.plain for t in targets]), np.stack([t.patches for t in targets]), outliers)
    assert fidelity.chosen < 0.6
    assert fidelity.mean > 0.85
    torch.testing.assert_close(model.pos_embed, load_model(str(MODEL)).pos_embed)
    assert json.loads((MODEL / "config.json").read_text())["architecture"].startswith("vit_")


def test_the_probe_learns_what_is_linear():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (40, 16))
    features = np.eye(3)[labels] @ rng.standard_normal((3, 8)) + 0.01 * rng.standard_normal((40, 16, 8))
    predicted = LinearProbe.fit(features[:30], labels[:30], 3).predict(features[30:])
    assert (predicted == labels[30:]).mean() == 1
    assert mean_iou(predicted, labels[30:], 3) == 1


def test_the_label_of_a_patch_is_its_most_frequent_one():
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, :2, :2] = [[1, 1], [1, 2]]
    np.testing.assert_array_equal(patch_labels(labels, 2, 3)[0], [[1, 0], [0, 0]])
