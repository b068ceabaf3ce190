"""Micro-batches and recomputed blocks need less memory and give the same student."""

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from phreg_deploy.artifacts.outliers import NormBand
from phreg_deploy.distill import distill, training
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.models.loading import load_model
from phreg_deploy.models.weights import weights_digest
from tests.cli_helpers import interrupted
from tests.small_models import small
from tests.training_helpers import SmallDataset, use_gradient_descent

LOSSES = ["transplant", "ph-reg"]


@pytest.fixture(scope="module")
def dataset_of(photos, tmp_path_factory):
    """``dataset_of(family)`` makes the data set of a model family, once each."""
    return functools.cache(lambda family="augreg": SmallDataset(family, photos, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_give_the_weights_of_the_whole_batch(dataset_of, monkeypatch, name, micro_batch):
    """Seven images make batches of 5 and 2; parts of 3 are then uneven."""
    use_gradient_descent(monkeypatch)
    recipe = replace(RECIPES[name], batch=5, epochs=2, lr=0.05, lr_end=0.04)
    whole, parts = (dataset_of().train(recipe, micro_batch=micro) for micro in (None, micro_batch))
    assert whole.sizes == [5, 2, 5, 2]
    assert parts.sizes == ([1] * 14 if micro_batch == 1 else [3, 2, 2, 3, 2, 2])
    whole.assert_close(parts)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_parts_add_up(dataset_of, name):
    """Use the loss of random features without a model; its weights are normalised over the whole batch."""
    recipe = RECIPES[name]
    drift = torch.rand(5, 9) ** 3
    batch = training.Batch(torch.zeros(5, 4, 4, 3), torch.randn(5, 9, 8), torch.randn(5, 8), drift, 5)
    tokens, results = torch.randn(5, 10, 8), []
    scale = training.TargetScale(1.3, 0.7, NormBand(1.5, 0.1))
    for micro_batch in (None, 1, 3):
        leaf, start, loss = tokens.clone().requires_grad_(True), 0, 0.0
        for part in training.split_batch(batch, recipe, micro_batch, 1):
            rows = slice(start, start := start + len(part.images))
            features = training.hooks.Features(leaf[rows], leaf[rows], leaf[rows, 1:].norm(dim=-1), 1, True)
            part_loss = training.objective(features, part, recipe, scale)
            part_loss.backward()
            loss += part_loss.item()
        results.append((loss, leaf.grad))
    weight = 1 + recipe.hard_weight * drift
    cosine = 1 - torch.cosine_similarity(tokens[:, 1:], batch.patches, dim=-1)
    square = (tokens[:, 1:] - batch.patches).square().mean(-1) / 1.3
    expected = ((cosine + square) * weight).sum() / weight.sum()
    if name == "transplant":
        other = (tokens[:, 0] - batch.cls).square().mean(-1) / 0.7
        expected += 4 * (1 - torch.cosine_similarity(tokens[:, 0], batch.cls, dim=-1) + other).mean()
        deviations = (tokens[:, 1:].norm(dim=-1) / 1.5).log().abs() / 0.1
        assert (deviations > 3).any()
        assert (deviations < 3).any()
        expected += torch.where(deviations > 3, (deviations - 3) ** 2, 0.0).mean()
    for loss, gradient in results:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-7)
    assert results[0][1].abs().max() > 1e-3


def test_a_part_larger_than_the_batch_is_the_batch(dataset_of):
    recipe = replace(RECIPES["transplant"], batch=5, epochs=1)
    whole, parts = dataset_of().train(recipe), dataset_of().train(recipe, micro_batch=100)
    assert parts.sizes == [5, 2]
    whole.assert_identical(parts)


@pytest.mark.parametrize(
    ("family", "name", "int8"),
    [
        ("augreg", "transplant", False),
        ("augreg", "ph-reg", False),
        ("augreg", "transplant", True),
        ("eva", "transplant", False),
        ("eva", "transplant", True),
        ("eva02-base", "transplant", False),
    ],
)
def test_recomputed_blocks_give_the_same_weights(dataset_of, family, name, int8):
    recipe = replace(RECIPES[name], batch=5, epochs=1, int8=int8)
    kept, again = (dataset_of(family).train(recipe, grad_checkpointing=on) for on in (False, True))
    kept.assert_identical(again)
    assert kept.forwards == [2, 2], "one per step"
    assert again.forwards == [4, 4], "each one again in the backward pass"
    assert again.saved < 0.5 * kept.saved
    assert again.student.grad_checkpointing is False


def test_recomputed_blocks_under_autocast(dataset_of):
    recipe = replace(RECIPES["transplant"], batch=5, epochs=1)
    kept, again = (dataset_of().train(recipe, autocast=True, grad_checkpointing=on) for on in (False, True))
    kept.assert_identical(again)
    assert again.forwards == [4, 4]


@pytest.mark.parametrize("family", ["augreg", "eva"])
def test_the_student_holds_fewer_activations(family):
    """Count the elements that autograd saves for the backward pass of ``hooks.forward`` alone."""
    model, images = small(family, depth=4).train(), torch.randn(2, 3, *small(family).patch_embed.img_size)
    saved = []
    for on in (False, True):
        copied, sizes = copy.deepcopy(model), []
        copied.set_grad_checkpointing(on)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            training.hooks.forward(copied, images).patches.sum().backward()
        saved.append(sum(sizes))
    assert saved[1] < 0.5 * saved[0]


# --- `distill`


def test_an_interrupted_run_can_be_resumed_in_parts(base, photos, tmp_path):
    """--resume compares neither option; the student is the same to rounding."""
    settings = {"epochs": 2, "batch": 8, "views": 3, "device": "cpu", "precision": "fp32", "lr": 1e-6}
    run = functools.partial(distill, str(base), photos, cache=tmp_path / "cache", **settings)
    run(tmp_path / "whole")
    with interrupted(training, "objective", at=5):
        run(tmp_path / "halves")
    stored = json.loads((tmp_path / "halves.partial" / "settings.json").read_text())
    assert not {"micro_batch", "grad_checkpointing", "device"} & set(stored)
    record = run(tmp_path / "halves", micro_batch=3, grad_checkpointing=True, resume=True)
    assert len(record.history.loss) == 2
    whole, halves = (load_model(str(tmp_path / name)) for name in ("whole", "halves"))
    assert halves.grad_checkpointing is False
    for name, value in whole.state_dict().items():
        np.testing.assert_allclose(halves.state_dict()[name].numpy(), value.numpy(), rtol=1e-4, atol=2e-5, err_msg=name)


def test_the_command_takes_both_options(base, photos, run_cli, tmp_path):
    words = ["--epochs", 1, "--batch", 8, "--views", 3, "--device", "cpu", "--precision", "fp32"]
    distil = ["distill", base, "--images", photos, "--cache", tmp_path / "cache", *words]
    assert run_cli(*distil, "-o", tmp_path / "kept").code == 0
    outcome = run_cli(*distil, "-o", tmp_path / "again", "--grad-checkpointing", "--micro-batch", 8)
    assert outcome.code == 0, outcome.err
    assert len({weights_digest(load_model(str(tmp_path / name))) for name in ("kept", "again")}) == 1
