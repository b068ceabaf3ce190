"""``average`` makes the student the exponential moving average of the weights after every step."""

import functools
from dataclasses import replace

import pytest
import torch

from phreg_deploy.distill import distill, training
from phreg_deploy.distill.devices.replicas import Replicas
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.models.loading import load_model
from phreg_deploy.student_record import read_record
from tests.cli_helpers import interrupted
from tests.training_helpers import SmallDataset


def test_the_student_is_the_average_of_the_steps(photos, tmp_path, monkeypatch):
    dataset, steps = SmallDataset("augreg", photos, tmp_path), []
    recipe = replace(RECIPES["transplant"], batch=3, epochs=2, lr=1e-2)
    real = Replicas.share_weights

    def recorded(replicas):
        real(replicas)
        steps.append({name: value.clone() for name, value in replicas.models[0].state_dict().items()})

    monkeypatch.setattr(Replicas, "share_weights", recorded)
    plain = dataset.train(recipe)
    assert len(steps) == 6
    expected = dict(steps[0])
    for state in steps[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in state.items()}
    averaged = dataset.train(replace(recipe, average=0.75))
    assert averaged.losses == plain.losses, "the average does not take part in training"
    for name, value in averaged.student.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    last = plain.student.state_dict()
    assert max((last[name] - value).abs().max().item() for name, value in expected.items()) > 1e-3
    assert not any(parameter.requires_grad is False for parameter in averaged.student.parameters())


def test_a_resumed_run_goes_on_with_its_average(base, photos, tmp_path):
    settings = {"epochs": 2, "batch": 8, "views": 3, "device": "cpu", "precision": "fp32", "strength": 0.1}
    run = functools.partial(distill, str(base), photos, cache=tmp_path / "cache", average=0.9, **settings)
    whole = run(tmp_path / "whole")
    steps = whole.history.steps_per_epoch
    with interrupted(training, "objective", at=steps + 2):
        run(tmp_path / "halves")
    run(tmp_path / "halves", resume=True)
    one, other = (load_model(str(tmp_path / name)).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert read_record(tmp_path / "halves")["recipe"]["average"] == 0.9
    plain = distill(str(base), photos, tmp_path / "plain", cache=tmp_path / "cache", **settings)
    assert plain.recipe.average == 0
    last = load_model(str(tmp_path / "plain")).state_dict()
    assert not all(torch.equal(last[name], value) for name, value in one.items())


@pytest.mark.parametrize("decay", ["-0.1", "1", "1.5", "nan"])
def test_a_decay_out_of_bounds_is_refused(base, photos, run_cli, tmp_path, decay):
    words = ["distill", base, "--images", photos, "-o", tmp_path / "out", "--average", decay, "--json"]
    run_cli(*words).refused(2, "average: got ", "expected a decay from 0 (no average) to below 1, e.g. 0.99")
    assert list(tmp_path.iterdir()) == []
