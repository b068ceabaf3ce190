"""Batches in parts and recomputed blocks: less memory, and the student that comes out without them."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from phreg_deploy.distill import training
from phreg_deploy.distill.distillation import Request, distill
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.models.loading import load_model
from phreg_deploy.models.weights import weights_digest
from tests.cli_helpers import interrupted
from tests.schooling import School, descent
from tests.small_models import small

LOSSES = ["transplant", "ph-reg"]


@pytest.fixture(scope="module")
def schools(photos, tmp_path_factory):
    made = {}

    def school(family="augreg"):
        if family not in made:
            made[family] = School(family, photos, tmp_path_factory.mktemp(family))
        return made[family]

    return school


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_parts_give_the_weights_of_the_whole_batch(schools, monkeypatch, name, micro_batch):
    """Seven images in batches of 5 and 2, so that parts of 3 are uneven."""
    descent(monkeypatch)
    recipe = replace(RECIPES[name], batch=5, epochs=2, lr=0.05, lr_end=0.04)
    whole, parts = (schools().train(recipe, micro_batch=micro) for micro in (None, micro_batch))
    assert whole.sizes == [5, 2, 5, 2]
    assert parts.sizes == ([1] * 14 if micro_batch == 1 else [3, 2, 2, 3, 2, 2])
    whole.compare(parts)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_parts_add_up(schools, name):
    """At random features, without a model: the loss alone, whose weights are normalised over the whole batch."""
    recipe = RECIPES[name]
    drift = torch.rand(5, 9) ** 3
    batch = training.Batch(torch.zeros(5, 4, 4, 3), torch.randn(5, 9, 8), torch.randn(5, 8), drift)
    tokens, found = torch.randn(5, 10, 8), []
    for micro_batch in (None, 1, 3):
        leaf, start, loss = tokens.clone().requires_grad_(True), 0, 0.0
        for part in training.divide(batch, recipe, micro_batch, 1):
            rows = slice(start, start := start + len(part.images))
            seen = training.hooks.Features(leaf[rows], leaf[rows], leaf[rows, 1:].norm(dim=-1), 1, True)
            one = training.objective(seen, part, recipe, training.Scale(1.3, 0.7), "cpu")
            one.backward()
            loss += one.item()
        found.append((loss, leaf.grad))
    weight = 1 + recipe.hard_weight * drift
    cosine = 1 - torch.cosine_similarity(tokens[:, 1:], batch.patches, dim=-1)
    square = (tokens[:, 1:] - batch.patches).square().mean(-1) / 1.3
    expected = ((cosine + square) * weight).sum() / weight.sum()
    if name == "transplant":
        other = (tokens[:, 0] - batch.cls).square().mean(-1) / 0.7
        expected += 4 * (1 - torch.cosine_similarity(tokens[:, 0], batch.cls, dim=-1) + other).mean()
    for loss, gradient in found:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-7)
    assert found[0][1].abs().max() > 1e-3


def test_a_part_larger_than_the_batch_is_the_batch(schools):
    recipe = replace(RECIPES["transplant"], batch=5, epochs=1)
    whole, parts = schools().train(recipe), schools().train(recipe, micro_batch=100)
    assert parts.sizes == [5, 2]
    whole.same(parts)


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
def test_recomputed_blocks_give_the_same_weights(schools, family, name, int8):
    recipe = replace(RECIPES[name], batch=5, epochs=1, int8=int8)
    kept, again = (schools(family).train(recipe, grad_checkpointing=on) for on in (False, True))
    kept.same(again)
    assert kept.calls == [2, 2]  # steps
    assert again.calls == [4, 4]  # forwards of each block: each step's again in its backward pass
    assert again.held < 0.5 * kept.held
    assert again.student.grad_checkpointing is False


def test_recomputed_blocks_under_autocast(schools):
    recipe = replace(RECIPES["transplant"], batch=5, epochs=1)
    kept, again = (schools().train(recipe, autocast=True, grad_checkpointing=on) for on in (False, True))
    kept.same(again)
    assert again.calls == [4, 4]


@pytest.mark.parametrize("family", ["augreg", "eva"])
def test_the_student_holds_fewer_activations(family):
    """What autograd keeps for the backward pass, read with its own hooks, of ``hooks.forward`` alone."""
    model, images = small(family, depth=4).train(), torch.randn(2, 3, *small(family).patch_embed.img_size)
    held = []
    for on in (False, True):
        one = copy.deepcopy(model)
        one.set_grad_checkpointing(on)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            training.hooks.forward(one, images).patches.sum().backward()
        held.append(sum(kept))
    assert held[1] < 0.5 * held[0]


# --- `distill`


def test_an_interrupted_run_goes_on_in_parts(base, photos, tmp_path):
    """Neither option is among the settings that --resume compares; the student is the same to rounding."""
    request = Request(str(base), photos, epochs=2, batch=8, views=3, device="cpu", precision="fp32", lr=1e-6)
    distill(request, tmp_path / "whole", cache=tmp_path / "cache")
    with interrupted(training, "objective", at=5):
        distill(request, tmp_path / "halves", cache=tmp_path / "cache")
    settings = json.loads((tmp_path / "halves.partial" / "settings.json").read_text())
    assert not {"micro_batch", "grad_checkpointing", "device"} & set(settings)
    changed = replace(request, micro_batch=3, grad_checkpointing=True)
    record = distill(changed, tmp_path / "halves", cache=tmp_path / "cache", resume=True)
    assert len(record["history"]["loss"]) == 2
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
