"""Weights and configurations that are damaged but can be read are refused with a message."""

import json
import shutil

import numpy as np
import pytest

from tests.cli_helpers import invoke

pytestmark = pytest.mark.usefixtures("torch")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mean", 0.5, "expected three numbers"),
        ("mean", [0.5, 0.5], "expected three numbers"),
        ("std", [0.2, 0.0, 0.2], "other than 0"),
        ("std", "x", "expected three numbers"),
        ("crop_pct", -0.5, "above 0"),
    ],
)
def test_preprocessing_that_is_none_is_refused(student, tmp_path, key, value, words):
    folder = shutil.copytree(student, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("pretrained_cfg", {})[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    invoke("export", folder, "-o", tmp_path / "bundle", "--json").refused(2, key, words)
    assert not (tmp_path / "bundle").exists()


def test_features_that_overflow_are_refused(base, photos, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["blocks.1.mlp.fc2.weight"] = np.full_like(weights["blocks.1.mlp.fc2.weight"], 3e38)
    save_file(weights, folder / "model.safetensors")
    invoke("artifacts", folder, "--images", photos, "--json").refused(2, "NaN or infinite", "damaged")
