import json

import numpy as np
import pytest
import torch

from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.checkpoint import read_record, write_student
from phreg_deploy.models.loading import load_model, model_spec
from phreg_deploy.models.registers import add_registers
from phreg_deploy.models.weights import weights_digest
from tests.cli_helpers import run_python
from tests.small_models import FAMILIES, small


@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_without_registers_changes_nothing(family):
    model = small(family)
    same = add_registers(model, 0)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(same.forward_features(images), model.forward_features(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(same(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_registers_stand_between_class_token_and_patches(family):
    model = small(family)
    student = add_registers(model, 3)
    spec = model_spec(student)
    assert spec.registers == 3
    assert spec.prefix_tokens == 3 + int(model.cls_token is not None)
    assert student.reg_token.std().item() == pytest.approx(model.embed_dim**-0.5, rel=0.35)
    with torch.no_grad():
        seen = hooks.forward(student, torch.randn(1, 3, *model.patch_embed.img_size))
    assert seen.patches.shape == (1, 16, 48)
    assert seen.norms.shape == (1, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student of every family on disk, with the features that this process computes."""
    root = tmp_path_factory.mktemp("students")
    for family in FAMILIES:
        student = add_registers(small(family), 4)
        folder = root / family
        folder.mkdir()
        write_student(student, {"scores": {}}, folder)
        images = torch.linspace(-2, 2, 3 * student.patch_embed.img_size[0] ** 2).reshape(
            1, 3, *student.patch_embed.img_size
        )
        with torch.no_grad():
            np.save(folder / "expected.npy", student.forward_features(images).numpy())
    return root


def test_stock_timm_loads_every_family_without_this_project(folders):
    """Load the student in a separate process, in which phreg_deploy cannot be imported."""
    code = """
import sys, json, numpy, pathlib, torch
sys.modules["phreg_deploy"] = None
import timm
report = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    side = model.patch_embed.img_size
    images = torch.linspace(-2, 2, 3 * side[0] ** 2).reshape(1, 3, *side)
    with torch.no_grad():
        got = model.forward_features(images).numpy()
    report[folder.name] = float(abs(got - numpy.load(folder / "expected.npy")).max())
print(json.dumps(report))
"""
    report = json.loads(run_python(code, folders, warnings="ignore").splitlines()[-1])
    assert set(report) == set(FAMILIES)
    assert max(report.values()) < 1e-5


def test_a_student_reads_back_as_it_was(folders):
    folder = folders / "augreg"
    assert weights_digest(load_model(str(folder))) == weights_digest(add_registers(small("augreg"), 4))
    assert read_record(folder)["format"] == 1


def test_a_model_with_registers_gets_no_more():
    with pytest.raises(PhregError, match="already has 4 register tokens"):
        add_registers(add_registers(small("augreg"), 4), 4)


def test_the_same_seed_gives_the_same_registers():
    model = small("augreg")
    assert torch.equal(add_registers(model, 4, seed=1).reg_token, add_registers(model, 4, seed=1).reg_token)
    assert not torch.equal(add_registers(model, 4, seed=1).reg_token, add_registers(model, 4, seed=2).reg_token)
