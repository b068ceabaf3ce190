"""INT8-aware distillation: a model in fake INT8 computes what its INT8 bundle computes, and is unchanged afterwards."""

import contextlib
import copy
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.distill import distill, training
from phreg_deploy.distill.fake_quantisation import observe_grids, quantised, quantised_layers
from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import load_model
from phreg_deploy.models.weights import weights_digest
from phreg_deploy.onnx_graph.session import open_session
from phreg_deploy.quantisation import Grid, Smoothing, quantise_weight
from tests.cli_helpers import interrupted
from tests.quantised_graphs import features, traced
from tests.small_models import FAMILIES, VARIANTS, small

PLAIN = Smoothing(None, None, None)
# The biases of its projection belong to no module, so hooks cannot reach the input.
SEPARATE = ["eva02"]
FUSED = [family for family in (*FAMILIES, *VARIANTS) if family not in SEPARATE]


def run(model, batches):
    """Return patch features ``(M, N, C)``."""
    with torch.no_grad():
        return np.concatenate([hooks.forward(model, batch).patches.numpy() for batch in batches])


@pytest.mark.parametrize("family", FUSED)
def test_layers_have_the_names_and_kinds_of_the_graphs(family):
    here = traced(family)
    graphs = {n.name: n.kind for n in here.linears}
    models = {}
    for name, (layer, kind) in quantised_layers(here.model).items():
        assert isinstance(layer, nn.Linear)
        path, last = name.rsplit(".", 1)
        models[f"{path}.{'qkv' if last in ('q_proj', 'k_proj', 'v_proj') else last}"] = kind
    assert models == graphs


@pytest.mark.parametrize("family", FUSED)
def test_fake_int8_computes_what_the_bundle_computes(family):
    here = traced(family)
    session = open_session(here.eight_bits("cpu"))
    served = np.concatenate([features(session, batch) for batch in here.images])
    real = run(here.model, here.batches)
    with quantised(here.model, observe_grids(here.model, here.batches, Smoothing())):
        fake = run(here.model, here.batches)
    assert agreement(fake, served).mean >= 0.99999
    assert agreement(fake, served).mean >= 1 - 0.5 * (1 - agreement(real, served).mean), (
        "closer to the bundle than the float model is"
    )


@pytest.mark.parametrize("smoothing", [PLAIN, Smoothing(0.5, 0.3, None, registers=False)])
@pytest.mark.parametrize("family", ["dinov2", "bare", "siglip"])
def test_every_smoothing_is_that_of_the_bundle(family, smoothing):
    here = traced(family)
    session = open_session(here.eight_bits("cpu", smoothing=smoothing))
    served = np.concatenate([features(session, batch) for batch in here.images])
    with quantised(here.model, observe_grids(here.model, here.batches, smoothing)):
        fake = run(here.model, here.batches)
    assert agreement(fake, served).mean >= 0.99999


@pytest.mark.parametrize("family", ["augreg", "siglip", "dinov2-giant"])
def test_grids_are_those_of_calibrate(family):
    here = traced(family)
    for smoothing in (Smoothing(), Smoothing(registers=False)):
        grids = observe_grids(here.model, here.batches, smoothing)
        expected = here.equalised(smoothing).grids
        assert set(grids) == set(expected)
        for name, grid in grids.items():
            assert abs(grid.zero - expected[name].zero) <= 1
            assert grid.step == pytest.approx(expected[name].step, rel=1e-3)


@pytest.mark.parametrize("family", ["augreg", "eva02-base"])
def test_the_model_is_unchanged_afterwards(family):
    here = traced(family)
    model = copy.deepcopy(here.model).train()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, run(model.eval(), here.batches)
    model.train()
    grids = observe_grids(model, here.batches, Smoothing())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with contextlib.suppress(KeyboardInterrupt), quantised(model, grids):
        assert set(model.state_dict()) == set(state)
        assert not np.array_equal(run(model.eval(), here.batches), before)
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any("forward" in vars(module) for module in model.modules())
    np.testing.assert_array_equal(run(model.eval(), here.batches), before)
    with quantised(model, {}):
        np.testing.assert_array_equal(run(model, here.batches), before)


def test_every_weight_learns_through_eight_bits():
    here = traced("augreg")
    model = copy.deepcopy(here.model).requires_grad_(True)
    gradients = []
    for grids in ({}, observe_grids(model, here.batches, Smoothing())):
        model.zero_grad()
        with quantised(model, grids):
            outputs = hooks.forward(model, here.batches[0])
        (outputs.patches.square().mean() + outputs.norms.mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    straight, through = gradients
    assert set(straight) == set(through)
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "reg_token", "blocks.0.norm1.weight"} <= set(through)
    for name in straight:
        a, b = straight[name].flatten(), through[name].flatten()
        assert torch.isfinite(b).all()
        assert torch.cosine_similarity(a, b, dim=0) > 0.9, name


def test_a_clipped_value_has_no_gradient():
    model = small("augreg", depth=1)
    layer = model.blocks[0].attn.qkv
    grid = Grid(np.zeros(48, np.float32), np.ones(48, np.float32), 0.01, 128)  # reaches from -1.27 to 1.27
    x = torch.tensor([[0.5, 1.27, 1.26, 1.3, -1.3, -1.27] + 42 * [0.0]], requires_grad=True)
    with quantised(model, {"blocks.0.attn.qkv": grid}):
        out = layer(x)
        out.sum().backward()
    clipped = [3, 4]
    assert not x.grad[0, clipped].any()
    assert (x.grad[0, [0, 1, 2, 5, 6]] != 0).all()
    k_x = torch.tensor([[50.0, 127, 126, 127, -127, -127] + 42 * [0.0]])
    values, steps = quantise_weight(layer.weight.detach().numpy().T)
    expected = 0.01 * k_x.numpy() @ values * steps + layer.bias.detach().numpy()
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_hidden_units_are_clipped_at_their_own_ends():
    model = small("augreg", depth=1)
    layer = model.blocks[0].mlp.fc2
    grid = Grid(np.zeros(192, np.float32), np.ones(192, np.float32), 0.01, 17)  # from -0.17 to 2.38
    x = torch.zeros(1, 192)
    x[0, :4] = torch.tensor([-0.17, -0.3, 2.38, 2.5])
    x.requires_grad_(True)
    with quantised(model, {"blocks.0.mlp.fc2": grid}):
        layer(x).sum().backward()
    assert [bool(v) for v in x.grad[0, :5] != 0] == [True, False, True, False, True]


@pytest.mark.parametrize("family", SEPARATE)
def test_a_model_whose_inputs_cannot_be_reached_is_refused(family):
    with pytest.raises(PhregError, match=r"int8-aware: got an Eva model with separate .*calibrate --float-macs"):
        quantised_layers(small(family))


# --- `distill --int8-aware`


@pytest.fixture(scope="module")
def aware(tmp_path_factory, base, photos):
    """Distil two epochs in fake INT8; return ``distill`` with its arguments but ``output``, the student, its record."""
    root = tmp_path_factory.mktemp("aware")
    settings = {"epochs": 2, "batch": 8, "views": 3, "device": "cpu", "precision": "fp32", "int8_aware": True}
    run = functools.partial(distill, str(base), photos, cache=root / "cache", **settings)
    return run, root / "student", run(root / "student")


def digest(folder):
    return weights_digest(load_model(str(folder)))


def test_the_record_says_what_eight_bits_keep(aware):
    _, folder, record = aware
    stored = json.loads((folder / "phreg.json").read_text())
    assert stored["recipe"]["int8"] is True
    eight = stored["scores"]["int8"]
    assert eight == record.scores.int8.to_json()
    assert set(eight) == {"norm_outliers", "fidelity", "own"}
    assert 0.99 < eight["own"]["p1"] <= eight["own"]["mean"] < 1
    assert eight["fidelity"]["mean"] == pytest.approx(record.scores.student.fidelity.mean, abs=0.01)
    assert np.isfinite(record.history.loss).all()


def test_int8_awareness_is_off_by_default(distilled):
    _, record = distilled
    assert record.recipe.int8 is False
    assert "int8" not in record.to_json()["scores"]


def test_every_step_runs_through_the_grids_of_its_epoch(aware, tmp_path, monkeypatch):
    run_aware, folder, _ = aware
    opened, real = [], training.quantised
    monkeypatch.setattr(training, "quantised", lambda model, grids: opened.append(grids) or real(model, grids))
    run_aware(tmp_path / "again")
    assert [len(grids) for grids in opened] == 6 * [12], "three steps per epoch and twelve layers"
    steps = [grids["blocks.0.mlp.fc2"].step for grids in opened]
    assert steps[:3] == 3 * steps[:1]
    assert steps[3:] == 3 * steps[3:4]
    assert steps[0] != steps[3], "ranges are observed before each epoch"
    assert digest(tmp_path / "again") == digest(folder)
    run_aware(tmp_path / "float", int8_aware=False)
    assert digest(tmp_path / "float") != digest(folder)


def test_an_interrupted_run_resumes_to_the_same_student(aware, tmp_path):
    run_aware, folder, _ = aware
    with interrupted(training, "objective", at=5):  # in the second epoch
        run_aware(tmp_path / "halves")
    with pytest.raises(PhregError, match=r"other settings .*recipe"):
        run_aware(tmp_path / "halves", int8_aware=False, resume=True)
    run_aware(tmp_path / "halves", resume=True)
    assert digest(tmp_path / "halves") == digest(folder)


def test_the_command_shows_eight_bits_beside_the_student(aware, base, photos, run_cli, tmp_path):
    run_aware, folder, _ = aware
    words = ["--epochs", 2, "--batch", 8, "--views", 3, "--device", "cpu", "--precision", "fp32", "--int8-aware"]
    cache = run_aware.keywords["cache"]
    distil = ["distill", base, "--images", photos, "-o", tmp_path / "out", "--cache", cache, *words, "--json"]
    outcome = run_cli(*distil)
    assert outcome.code == 0, outcome.err
    assert "student, fake INT8" in outcome.err
    assert "cosine to the student's own FP32" in outcome.err
    assert digest(tmp_path / "out") == digest(folder)


def test_eva_is_refused_before_any_target_is_computed(run_cli, photos, tmp_path):
    from phreg_deploy.models.checkpoint import write_student

    (tmp_path / "eva").mkdir()
    write_student(small("eva02", depth=1), {"scores": {}}, tmp_path / "eva")
    words = ["distill", tmp_path / "eva", "--images", photos, "-o", tmp_path / "out", "--cache", tmp_path / "cache"]
    run_cli(*words, "--int8-aware", "--json").refused(
        2, "int8-aware: got an Eva model with separate query and value biases"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"eva"}
