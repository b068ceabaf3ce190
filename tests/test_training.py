import json
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from phreg_deploy.distill import distill, distillation, training
from phreg_deploy.distill.recipes import RECIPES
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import origin
from phreg_deploy.models.batches import split
from phreg_deploy.models.checkpoint import write_student
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.models.weights import unlock_weights, weights_digest
from tests.cli_helpers import interrupted
from tests.small_models import plant, small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Make a folder with ``model``, which has a planted register neuron, and ``pictures``, 24 images."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "model").mkdir()
    write_student(plant(small("augreg")), {"scores": {}}, root / "model")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC).save(root / "pictures" / f"{i:02}.png")
    return root


def distil(inputs, output, **changes):
    """Distil in two epochs, or with other settings; targets are cached beside the output."""
    settings = {
        "epochs": 2,
        "batch": 8,
        "views": 3,
        "precision": "fp32",
        "holdout": 0.2,
        "model": str(inputs / "model"),
    }
    return distill(images=inputs / "pictures", output=output, cache=output.parent / "cache", **{**settings, **changes})


def digest(folder):
    return weights_digest(load_model(str(folder)))


DOORS = """
import sys
for name in ("torch", "timm", "safetensors", "onnx", "onnxruntime"):
    sys.modules[name] = None
from phreg_deploy.demo import run_demo
from phreg_deploy.distill import distill
from phreg_deploy.errors import BackendMissing, PhregError
try:
    distill(sys.argv[1], sys.argv[2], sys.argv[3], recipe="ph-reg", strength=0.1)
except PhregError as error:
    print(error)
for call in (lambda: distill(*sys.argv[1:4]), lambda: run_demo(sys.argv[3])):
    try:
        call()
    except BackendMissing as error:
        print(error)
"""


def test_public_functions_are_imported_without_pytorch_and_check_arguments_first(inputs, tmp_path):
    words = [inputs / "model", inputs / "pictures", tmp_path / "student"]
    command = [sys.executable, "-W", "error", "-c", DOORS, *(str(word) for word in words)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    strength, distillation_error, demo_error = process.stdout.splitlines()
    assert strength.startswith("strength: got 0.1 with the recipe ph-reg, which moves no neurons")
    assert distillation_error == (
        "phreg_deploy.distill needs the modules 'safetensors', 'timm', 'torch', which are not installed. "
        'Run: pip install "phreg-deploy[distill]"'
    )
    assert "'onnx'" in demo_error
    assert list(tmp_path.iterdir()) == []


def test_the_same_request_gives_the_same_student_and_a_better_one(inputs, tmp_path):
    records = [distil(inputs, tmp_path / name) for name in ("a", "b")]
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    scores = records[0].scores
    assert scores.base.norm_outliers.rate == pytest.approx(1 / 16, rel=0.2)
    assert scores.student.norm_outliers.rate < 0.01
    assert scores.student.fidelity.outliers > scores.base.fidelity.outliers
    assert records[0].seconds.targets_computed > 0
    assert records[1].seconds.targets_computed == 0, "the targets are in the cache"
    assert not list(tmp_path.glob("*.partial"))
    held_out = set(records[0].images.held_out)
    assert held_out
    assert records[0].images.trained + len(held_out) == 24


def test_an_interrupted_run_resumes_to_the_same_student(inputs, tmp_path):
    distil(inputs, tmp_path / "whole")
    with interrupted(training, "objective", at=5):  # in the second epoch
        distil(inputs, tmp_path / "halves")
    assert not (tmp_path / "halves").exists()
    with pytest.raises(PhregError, match="--resume"):
        distil(inputs, tmp_path / "halves")
    with pytest.raises(PhregError, match=r"other settings .*seed"):
        distil(inputs, tmp_path / "halves", seed=1, resume=True)
    distil(inputs, tmp_path / "halves", resume=True)
    assert digest(tmp_path / "halves") == digest(tmp_path / "whole")
    assert not (tmp_path / "halves.partial").exists()


def test_a_student_that_lacks_its_scores_is_scored_without_training_again(inputs, tmp_path):
    whole, out = distil(inputs, tmp_path / "whole"), tmp_path / "out"
    with interrupted(distillation, "score_student", at=1):
        distil(inputs, out)
    assert "missing" in json.loads((out / "phreg.json").read_text())["scores"]
    with pytest.raises(PhregError, match=r"interrupted run is kept in .*--resume"):
        distil(inputs, out)
    with pytest.raises(PhregError, match=r"other settings .*seed"):
        distil(inputs, out, seed=1, resume=True)
    with mock.patch.object(training, "write_state", side_effect=AssertionError("it is trained again")):
        scored = distil(inputs, out, resume=True)
    assert scored.scores == whole.scores
    assert digest(out) == digest(tmp_path / "whole")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_a_student_of_another_run_is_not_replaced_by_resuming(inputs, tmp_path):
    distil(inputs, tmp_path / "out", seed=1)
    before = digest(tmp_path / "out")
    with interrupted(training, "objective", at=5):
        distil(inputs, tmp_path / "out", force=True)
    with pytest.raises(PhregError, match="exists already"):
        distil(inputs, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_heads": 6}, "heads"), ({"act_layer": "quick_gelu"}, "modules"), ({"mean": [0.4, 0.4, 0.4]}, "preprocess")],
)
def test_a_run_of_the_same_weights_computed_otherwise_is_not_resumed(inputs, tmp_path, changes, named):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    with interrupted(training, "objective", at=5):
        distil(inputs, tmp_path / "student", model=str(model))
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg" if "mean" in changes else "model_args"].update(changes)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhregError, match=rf"other settings \(.*{named}"):
        distil(inputs, tmp_path / "student", model=str(model), resume=True)


def test_the_weights_are_hashed_once(inputs, tmp_path, monkeypatch):
    calls, real = [], origin.weights_digest
    monkeypatch.setattr(origin, "weights_digest", lambda model: calls.append(1) or real(model))
    record = distil(inputs, tmp_path / "student", epochs=0)
    assert len(calls) == 1
    assert record.source["weights_sha256"] == digest(inputs / "model")


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_kept(inputs, tmp_path, monkeypatch):
    real, calls = training.objective, []

    def nan_at_the_fifth_call(*arguments):
        if torch.is_grad_enabled():
            calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(training, "objective", nan_at_the_fifth_call)
    with pytest.raises(PhregError, match=r"loss became nan in epoch 2, step 2\. The state after epoch 1 is kept"):
        distil(inputs, tmp_path / "student")
    state = torch.load(tmp_path / "student.partial" / "state.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(torch.isfinite(v).all() for v in state["student"].values())
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "changes", [{"recipe": "ph-reg"}, {"recipe": "random-registers"}, {"registers": 0}, {"epochs": 0}]
)
def test_the_recipes_of_the_paper_the_control_and_no_training_run(inputs, tmp_path, changes):
    record = distil(inputs, tmp_path / "student", **changes)
    model = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    expected = 16 if changes.get("recipe") == "ph-reg" else changes.get("registers", 4)
    assert (0 if model.reg_token is None else model.reg_token.shape[1]) == record.registers == expected
    assert len(record.history.loss) == changes.get("epochs", 2)
    if "recipe" in changes:
        assert record.register_neurons == {}
    else:
        assert [(n.block, n.unit) for n in record.register_neurons] == [(0, 5)]
    stored = json.loads((tmp_path / "student" / "phreg.json").read_text())
    assert stored["recipe"]["name"] == changes.get("recipe", "transplant")
    assert stored == json.loads(json.dumps({"format": 1, **record.to_json()}))


def test_random_registers_differ_from_the_transplant_in_the_move_alone(inputs, tmp_path):
    ours, control = RECIPES["transplant"], RECIPES["random-registers"]
    assert replace(control, name=ours.name, moves_neurons=True) == ours
    distil(inputs, tmp_path / "control", recipe="random-registers", epochs=0)
    assert digest(tmp_path / "control") == weights_digest(add_registers(load_model(str(inputs / "model")), 4, seed=0))
    assert control.default_rate(768) == ours.default_rate(768) == ours.lr / 2


def test_neurons_are_searched_on_images_from_all_over_the_folder(inputs, tmp_path, monkeypatch):
    names, real = [], distillation.find_register_neurons

    def record_names(model, batches, advance):
        names.extend(batches.photographs.names)
        return real(model, batches, advance)

    monkeypatch.setattr(distillation, "SEARCH_IMAGES", 4)
    monkeypatch.setattr(distillation, "find_register_neurons", record_names)
    distil(inputs, tmp_path / "student", epochs=0, holdout=0)
    assert names == ["00.png", "06.png", "12.png", "18.png"]


def test_a_neuron_that_cannot_be_moved_is_refused_before_targets_are_computed(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("phreg_deploy.distill.neurons.transplant.LEAST_GAP", 0.99)
    with pytest.raises(PhregError, match=r"none of the 1 register neurons can be moved; unit 5 of block 0"):
        distil(inputs, tmp_path / "student")
    assert list(tmp_path.iterdir()) == [], "neither targets nor an interrupted run"


def test_ph_reg_trains_the_parameters_of_the_paper():
    model = small("augreg", depth=3)
    free = unlock_weights(model, RECIPES["ph-reg"].unlock)
    names = {name for name, p in model.named_parameters() if any(p is f for f in free)}
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"} <= names
    assert all(n.startswith(("pos_embed", "cls_token", "patch_embed.", "blocks.2.")) for n in names)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in names)
    unlock_weights(model, "all")
    assert not model.head.weight.requires_grad
    assert model.blocks[0].mlp.fc1.weight.requires_grad


def test_the_holdout_split_depends_on_names_alone(inputs):
    photographs = read_photographs(inputs / "pictures", (64, 64), model_preprocess(small("augreg")))
    training_set, held_out = split(photographs, 0.2)
    _, fewer_held_out = split(photographs.subset(range(20)), 0.2)
    assert not set(training_set.names) & set(held_out.names)
    assert set(fewer_held_out.names) <= set(held_out.names)
    assert split(photographs.subset(range(10)), 0.2)[1] is None
    with pytest.raises(PhregError, match="holdout"):
        split(photographs, 1.5)
