"""examples/parity-in-ci: its own workflow's command on a sound bundle and on broken ones, without PyTorch and onnx."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from tests.broken_bundles import BrokenBundle, add_garbage_token
from tests.cli_helpers import ROOT

pytestmark = pytest.mark.usefixtures("torch")
yaml = pytest.importorskip("yaml")
EXAMPLE = ROOT / "examples" / "parity-in-ci"
NOT_IN_THE_BASE_INSTALL = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision", "sklearn", "scipy")


def steps():
    workflow = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "model.yml").read_text())
    return workflow["jobs"]["model"]["steps"]


@pytest.fixture
def run_example(tmp_path, photos):
    """Run the workflow's pytest in a copy of the example with a bundle; returns the process and the artifacts."""

    def run(bundle):
        project = tmp_path / "project"
        shutil.copytree(EXAMPLE, project)
        shutil.copytree(bundle, project / "model.bundle")
        (project / "photos").mkdir()
        for path in sorted(photos.iterdir())[:6]:
            shutil.copy(path, project / "photos")
        for name in NOT_IN_THE_BASE_INSTALL:
            (tmp_path / "blocked" / name).mkdir(parents=True)
            (tmp_path / "blocked" / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed')\n")
        (command,) = [step["run"] for step in steps() if step.get("run", "").startswith("pytest ")]
        outcome = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=project,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
                "PYTHONPATH": f"{tmp_path / 'blocked'}{os.pathsep}{ROOT}",
                # For a development install that is older than the entry point; else the plugin is there already.
                "PYTEST_ADDOPTS": "-p phreg_deploy.pytest_plugin",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return outcome, project / "artifacts"

    return run


def cases(artifacts):
    """Test name -> (whether it failed, its properties)."""
    tree = ElementTree.parse(artifacts / "junit.xml")
    return {
        case.get("name"): (
            case.find("failure") is not None,
            {p.get("name"): p.get("value") for p in case.iter("property")},
        )
        for case in tree.iter("testcase")
    }


def test_a_sound_bundle_passes(run_example, bundle):
    outcome, artifacts = run_example(bundle)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = cases(artifacts)
    assert {name: failed for name, (failed, _) in found.items()} == dict.fromkeys(
        ("test_parity", "test_artifact_rate", "test_latency"), False
    )
    assert float(found["test_parity"][1]["phreg.parity.exam.cosine_p1"]) > 0.99999
    assert float(found["test_artifact_rate"][1]["phreg.artifact_rate.rate"]) <= 0.01
    assert float(found["test_latency"][1]["phreg.latency.extractor.p50_ms"]) > 0
    assert [path.name for path in artifacts.iterdir()] == ["junit.xml"]


def test_a_broken_bundle_fails_with_the_gate_the_image_and_the_patch(run_example, demo_bundle, tmp_path):
    """The demo's base model has outlier tokens, which `distill` would have removed; one more token is made noise."""
    broken = BrokenBundle(demo_bundle, tmp_path / "broken.bundle")
    add_garbage_token(broken)
    outcome, artifacts = run_example(broken.save())
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    failed = {name for name, (failed, _) in cases(artifacts).items() if failed}
    assert failed == {"test_parity", "test_artifact_rate"}
    assert "cosine_min: smallest patch cosine" in outcome.stdout
    assert "exam case 0, image 0 (128x128): 1 - cosine at patch (row, column) (0, 0)" in outcome.stdout
    assert "of the patch tokens of 6 images are norm outliers, expected at most 1.0000%" in outcome.stdout
    written = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*") if path.is_file()}
    assert written == {
        "junit.xml",
        "tests-test_model.py-test_parity/parity.json",
        "tests-test_model.py-test_parity/parity.png",
        "tests-test_model.py-test_artifact_rate/artifact_rate.json",
        "tests-test_model.py-test_artifact_rate/artifact_rate.png",
    }
    document = json.loads((artifacts / "tests-test_model.py-test_parity" / "parity.json").read_text())
    assert document["test"] == "tests/test_model.py::test_parity"
    patch = document["missed"][0]["places"][0]["patches"][0]
    assert (patch["row"], patch["column"]) == (0, 0)


def test_the_workflow_installs_the_extras_and_keeps_the_artifacts():
    runs = [step.get("run", "") for step in steps()]
    assert 'pip install "phreg-deploy[cpu,pytest]"' in runs
    (upload,) = [step for step in steps() if step.get("uses", "").startswith("actions/upload-artifact@")]
    assert upload["if"] == "always()"
    (command,) = [run for run in runs if run.startswith("pytest ")]
    assert f"--phreg-artifacts={upload['with']['path'].rstrip('/')}" in command
