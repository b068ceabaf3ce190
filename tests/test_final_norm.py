"""Models whose only final norm comes after the pooling: EVA02, EVA-g, and timm's ViTs that average their patches."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from phreg_deploy.distill import distill
from phreg_deploy.distill.teacher import Teacher
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.answers import read_features
from phreg_deploy.models.checkpoint import write_student
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.registers import add_registers
from tests.small_models import small

# Families of tests/small_models.py that have fc_norm alone.
POOLED = ["eva", "eva02", "eva02-base", "mae"]
# timm names, one of each kind.
NAMES = [
    "eva02_tiny_patch14_224",
    "eva02_small_patch14_336",
    "eva02_base_patch14_448",
    "eva02_large_patch14_224",
    "eva_giant_patch14_560",
    "eva_large_patch14_196",
    "vit_base_patch16_reg4_gap_256",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_so150m2_patch16_reg1_gap_256",
]
ON_TOKENS = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch16_siglip_gap_224",
    "eva02_base_patch16_clip_224",
]


@pytest.fixture
def cases(photos):
    """A function that returns photographs at a model's input size, and its preprocessing."""

    def fitted(model):
        preprocess = model_preprocess(model)
        return read_photographs(photos, tuple(model.patch_embed.img_size), preprocess, limit=3), preprocess

    return fitted


@pytest.mark.parametrize("name", NAMES)
def test_a_pooled_models_final_norm_is_fc_norm(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert hooks.final_norm(model) is model.fc_norm
    assert isinstance(model.fc_norm, nn.LayerNorm)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_other_models_keep_the_norm_on_their_tokens(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert hooks.final_norm(model) is model.norm
    assert isinstance(model.norm, nn.LayerNorm)


@pytest.mark.parametrize("family", POOLED)
def test_teacher_student_and_graph_apply_it_to_every_token(family, cases):
    """Otherwise the norm of the raw residual would weight the views of a patch in the target."""
    model = small(family)
    photographs, preprocess = cases(model)
    pixels = photographs.batch(0, 3)
    images = hooks.normalise(pixels, preprocess.mean, preprocess.std)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        raw = model.forward_features(images)
        wanted = model.fc_norm(raw)[:, prefix:].numpy()
        assert np.abs(wanted - raw[:, prefix:].numpy()).max() > 0.1
        np.testing.assert_allclose(read_features(model, photographs, preprocess)["patches"], wanted, atol=1e-5)
        plain = np.stack([t.plain for t in Teacher(model, preprocess, views=2).targets(photographs)])
        np.testing.assert_allclose(plain.reshape(wanted.shape), wanted, atol=1e-4)
        features, *_, norms = DenseViT(model, preprocess)(torch.from_numpy(pixels))
        np.testing.assert_allclose(features.reshape(wanted.shape).numpy(), wanted, atol=1e-4)
        np.testing.assert_allclose(norms.flatten(1).numpy(), raw[:, prefix:].norm(dim=-1).numpy(), rtol=1e-4)
        student = hooks.forward(add_registers(model, 0), images).patches.numpy()
        np.testing.assert_allclose(student, wanted, atol=1e-4)


@pytest.mark.parametrize("family", POOLED)
def test_the_head_still_gets_what_timm_gives_it(family, cases):
    """The head gets a token that was normalised once, not twice."""
    model = small(family)
    photographs, preprocess = cases(model)
    with torch.no_grad():
        wanted = model(hooks.normalise(photographs.batch(0, 3), preprocess.mean, preprocess.std)).numpy()
    np.testing.assert_allclose(read_features(model, photographs, preprocess)["logits"], wanted, atol=1e-5)


def test_a_pooled_model_distils_towards_normed_tokens(photos, tmp_path):
    base = small("eva02-base")
    (tmp_path / "base").mkdir()
    write_student(base, {"scores": {}}, tmp_path / "base")
    settings = {"epochs": 6, "batch": 8, "lr": 3e-4, "views": 2, "precision": "fp32", "device": "cpu"}
    record = distill(str(tmp_path / "base"), photos, tmp_path / "student", cache=tmp_path / "cache", **settings)
    student = load_model(str(tmp_path / "student"))
    # It belongs to the head, and does not train.
    assert torch.equal(student.fc_norm.weight, load_model(str(tmp_path / "base")).fc_norm.weight)
    assert record.history.loss[-1] < 0.9 * record.history.loss[0]
    assert record.scores.student.fidelity.mean > 0.5
