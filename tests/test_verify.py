"""The public functions of ``phreg_deploy.verify`` import little, and return what the commands print as JSON."""

import json

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.verify import check, score_artifacts
from tests.cli_helpers import invoke, run_python

pytestmark = pytest.mark.usefixtures("torch")


def test_the_doors_are_light():
    code = (
        "import sys, phreg_deploy.verify\n"
        "print(sorted({'numpy', 'torch', 'timm', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    assert run_python(code, warnings="default") == "[]\n"


def test_check_returns_what_the_command_prints(bundle, student, photos):
    options = ["--backend", "onnxruntime-cpu", "--threads", "1", "--reference", student, "--images", photos]
    document = invoke("check", bundle, *options, "--limit", "2", "--json").document
    report = check(
        bundle,
        backend="onnxruntime-cpu",
        options=BackendOptions(threads=1),
        reference=str(student),
        images=photos,
        limit=2,
    )
    assert report.missed == []
    assert report.artifacts["base"].incoherent is None
    assert report.by_image.reference == "student"
    assert [row.image for row in report.by_image.images] in (
        ["frame-00.png", "frame-01.jpg"],
        ["frame-01.jpg", "frame-00.png"],
    )
    assert json.loads(json.dumps(report.to_json())) == document


def test_a_missed_gate_is_in_the_report(bundle):
    report = check(bundle, backend="onnxruntime-cpu", cosine=1.0, outlier_points=-1.0)
    assert not report.to_json()["passed"]
    assert len(report.missed) >= 1


def test_artifacts_of_a_bundle_are_what_the_command_prints(bundle, photos):
    document = invoke("artifacts", bundle, "--images", photos, "--limit", "2", "--json").document
    report = score_artifacts(str(bundle), photos, limit=2)
    assert json.loads(json.dumps(report.to_json())) == document
    assert report.blocks is None


def test_arguments_without_effect_are_refused(bundle, base, photos):
    with pytest.raises(PhregError, match="--device goes with a PyTorch model"):
        score_artifacts(str(bundle), photos, device="cpu")
    with pytest.raises(PhregError, match="--backend goes with a bundle"):
        score_artifacts(str(base), photos, backend="openvino")
    with pytest.raises(PhregError, match="--reference needs --images"):
        check(bundle, reference=str(base))
