"""Train singular values alone: which weights change, in which way, and in every setting of training."""

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from phreg_deploy.distill.devices.launch import find_launch
from phreg_deploy.distill.devices.processes import joined
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.distill.singular import neighbours
from phreg_deploy.distill.singular.values import merge_singular_values, train_singular_values
from phreg_deploy.models import hooks
from tests.process_helpers import run_processes
from tests.small_models import small
from tests.training_helpers import SmallDataset, use_gradient_descent

ON_TARGETS = replace(RECIPES["random-registers"], unlock="singular-values", batch=5, epochs=2, lr=0.01)
ON_NEIGHBOURS = replace(RECIPES["sinder"], batch=5, epochs=2, lr=0.01)
TWO = ("cpu", "cpu")


@pytest.fixture(scope="module")
def dataset_of(photos, tmp_path_factory):
    """``dataset_of(family)`` makes the data set of a model family, once each."""
    return functools.cache(lambda family="augreg": SmallDataset(family, photos, tmp_path_factory.mktemp(family)))


@pytest.fixture
def many_defects(monkeypatch):
    """Let every random image of 16 tokens have defective ones."""
    monkeypatch.setattr(neighbours, "DEVIATIONS", 1.0)
    monkeypatch.setattr(neighbours, "LEAST", 1)


@pytest.mark.parametrize("family", ["augreg", "eva", "eva02-base", "dinov2-giant", "rope-mixed", "sapiens2", "gated"])
def test_nothing_but_singular_values_changes(dataset_of, family):
    run = dataset_of(family).train(ON_TARGETS)
    state, changed = run.student.state_dict(), set()
    assert list(state) == list(run.before) or set(state) == set(run.before)
    for name, before in run.before.items():
        after = state[name]
        if torch.equal(after, before):
            continue
        changed.add(name.split(".", 2)[2])
        first = len(before) * 2 // 3 if "qkv" in name else 0
        assert torch.equal(after[:first], before[:first]), "queries and keys"
        left, values, right = torch.linalg.svd(before[first:].double(), full_matrices=False)
        core = left.T @ after[first:].double() @ right.T
        rest = after[first:].double() - left @ core @ right
        moved = core.diagonal() - values
        assert moved.abs().max() > 1e-3
        for other in (core - core.diagonal().diag(), rest):
            assert other.abs().max() < 1e-6, "the singular vectors stay"
    value = {"qkv", "v_proj"} & {name.split(".")[1] for name in changed}
    assert len(value) == 1
    layers = {name for name, module in run.student.blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}
    frozen = {"attn.q_proj", "attn.k_proj"}
    assert changed == {f"{name}.weight" for name in layers - frozen}
    assert all(parameter.requires_grad for parameter in run.student.parameters())


def test_a_model_computes_the_same_until_the_values_change_and_is_plain_again_after_the_merge():
    model, images = small("eva02-base"), torch.randn(2, 3, 56, 56)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, expected = [type(module) for module in model.modules()], hooks.forward(model, images).tokens
    changes = train_singular_values(model)
    assert [p for p in model.parameters() if p.requires_grad] == changes
    assert len(changes) == 2 * 5, "values, projection and the three layers of the MLP"
    assert torch.equal(hooks.forward(model, images).tokens, expected)
    with torch.no_grad():
        changes[0] += 0.1
    apart = hooks.forward(model, images).tokens
    assert not torch.allclose(apart, expected, atol=1e-3)
    merge_singular_values(model)
    assert [type(module) for module in model.modules()] == kinds
    assert set(model.state_dict()) == set(before)
    torch.testing.assert_close(hooks.forward(model, images).tokens, apart)
    merge_singular_values(model)


@pytest.mark.usefixtures("many_defects")
@pytest.mark.parametrize("recipe", [ON_TARGETS, ON_NEIGHBOURS], ids=["targets", "neighbours"])
@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 1}, {"micro_batch": 3}, {"devices": TWO}, {"devices": TWO, "micro_batch": 1}],
    ids=str,
)
def test_parts_and_devices_give_the_weights_of_the_whole_batch(dataset_of, monkeypatch, recipe, options):
    use_gradient_descent(monkeypatch)
    recipe = replace(recipe, lr=5.0, lr_end=4.0) if recipe is ON_NEIGHBOURS else replace(recipe, lr=0.5, lr_end=0.4)
    dataset_of().train(recipe).assert_close(dataset_of().train(recipe, **options))


@pytest.mark.usefixtures("many_defects")
@pytest.mark.parametrize("recipe", [ON_TARGETS, ON_NEIGHBOURS], ids=["targets", "neighbours"])
def test_recomputed_blocks_and_repeated_runs_give_the_same_weights(dataset_of, recipe):
    kept = dataset_of().train(recipe)
    kept.assert_identical(dataset_of().train(recipe, grad_checkpointing=True))
    kept.assert_identical(dataset_of().train(recipe))


@pytest.mark.fresh_process
@pytest.mark.usefixtures("many_defects")
@pytest.mark.parametrize("recipe", [ON_TARGETS, ON_NEIGHBOURS], ids=["targets", "neighbours"])
def test_processes_give_the_weights_of_one(dataset_of, monkeypatch, tmp_path, recipe):
    use_gradient_descent(monkeypatch)
    recipe = replace(recipe, lr=5.0, lr_end=4.0) if recipe is ON_NEIGHBOURS else replace(recipe, lr=0.5, lr_end=0.4)
    whole = dataset_of().train(recipe)

    def work(rank):
        with joined(find_launch()) as processes:
            run = dataset_of().train(recipe, processes=processes, micro_batch=1)
            return run.student.state_dict(), run.losses

    ends = run_processes(work, tmp_path, count=3)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].output
    for state, losses in (end.result for end in ends):
        whole.assert_close(replace(whole, student=mock.Mock(state_dict=lambda state=state: state), losses=losses))


@pytest.mark.usefixtures("many_defects")
@pytest.mark.parametrize("changes", [{"average": 0.5}, {"int8": True}], ids=str)
def test_averages_and_fake_quantisation_train_them_too(dataset_of, changes):
    plain, other = (dataset_of().train(recipe) for recipe in (ON_NEIGHBOURS, replace(ON_NEIGHBOURS, **changes)))
    assert set(other.student.state_dict()) == set(plain.student.state_dict())
    key = "blocks.0.mlp.fc2.weight"
    before, first, second = (
        state[key] for state in (plain.before, plain.student.state_dict(), other.student.state_dict())
    )
    assert not torch.equal(first, second)
    assert not torch.equal(second, before)


def test_a_step_without_defective_tokens_changes_nothing_despite_the_momentum(dataset_of, monkeypatch):
    """Only the first forward finds defective tokens; the weights after its step must stay."""
    real, calls = neighbours.find_defective, []

    def at_first(cosines):
        calls.append(1)
        return real(cosines) & (len(calls) == 1)

    monkeypatch.setattr(neighbours, "DEVIATIONS", 1.0)
    monkeypatch.setattr(neighbours, "LEAST", 1)
    monkeypatch.setattr(neighbours, "find_defective", at_first)
    one, two = (replace(ON_NEIGHBOURS, batch=7, epochs=epochs) for epochs in (1, 2))
    first = dataset_of().train(one)
    calls.clear()
    second = dataset_of().train(two)
    assert first.losses[0] == second.losses[0] > 0
    assert second.losses[1] == 0
    for name, value in first.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], value), name
    assert any(not torch.equal(value, first.before[name]) for name, value in first.student.state_dict().items())
