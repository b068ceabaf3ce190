"""The assertions of the pytest plugin in runs of pytest of their own: verdicts, messages, artifacts, properties."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.plugin_runs import BACKEND, PARITY, report

pytestmark = pytest.mark.usefixtures("torch")


def red(picture):
    """Share of pixels that have the colour of the marks."""
    with Image.open(picture) as image:
        return float((np.asarray(image) == (255, 40, 40)).all(-1).mean())


def test_a_sound_bundle_passes_and_every_figure_is_a_property(run, pytester, bundle):
    outcome = run(PARITY, f"--phreg-bundle={bundle}", "--junitxml", "report.xml", "-W", "error")
    outcome.assert_outcomes(passed=1)
    case = ElementTree.parse(pytester.path / "report.xml").find(".//testcase")
    properties = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert properties["phreg.parity.backend"] == BACKEND
    assert float(properties["phreg.parity.exam.cosine_p1"]) > 0.99999
    assert {"cosine_mean", "cosine_min", "relative_l2", "outlier_points", "norm_difference"} <= {
        name.removeprefix("phreg.parity.exam.") for name in properties
    }
    assert not (pytester.path / "artifacts").exists()


def test_a_garbage_token_is_named_by_gate_image_and_patch(run, pytester, garbage):
    outcome = run(PARITY, f"--phreg-bundle={garbage}", "--phreg-artifacts=artifacts", "--junitxml", "report.xml")
    outcome.assert_outcomes(failed=1)
    text = outcome.stdout.str()
    assert re.search(r"AssertionError: assert_parity: \S+garbage.bundle misses \d gates on onnxruntime-cpu, fp32", text)
    assert "cosine_min: smallest patch cosine" in text
    assert re.search(
        r"exam case 0, image 0 \(64x64\): 1 - cosine at patch \(row, column\) \(0, 0\) [01]\.\d+, of 8 x 8\n", text
    )
    assert "    assert_parity()" in text, "the traceback shows the line of the test"
    assert "pytest_plugin/parity.py" not in text, "and no line of the plugin"
    path, document = report(pytester, "parity")
    assert path.parent.name == "test_model.py-test_parity"
    assert document["passed"] is False
    gate = next(m for m in document["missed"] if m["gate"] == "cosine_min")
    assert gate["figure"] < gate["bar"] == 0.9999
    worst = gate["places"][0]["patches"][0]
    assert (worst["row"], worst["column"]) == (0, 0)
    assert worst["value"] == pytest.approx(1 - gate["figure"])
    assert document["comparisons"][0]["images"][0]["cosine_min"] == pytest.approx(gate["figure"])
    assert 0.001 < red(path.with_suffix(".png")) < 0.2
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 6 * 256
    assert "phreg.parity.exam.cosine_min" in (pytester.path / "report.xml").read_text(), "failures have properties too"


def test_values_that_are_not_finite_are_named_and_drawn(run, pytester, bundle, tmp_path):
    broken = BrokenBundle(bundle, tmp_path / "nan.bundle")
    scale_outputs(broken, features=float("nan"))
    outcome = run(PARITY, f"--phreg-bundle={broken.save()}", "--phreg-artifacts=artifacts")
    outcome.assert_outcomes(failed=1)
    path, document = report(pytester, "parity")
    bad = next(m for m in document["missed"] if m["gate"] == "bad_values")
    assert bad["figure"] == 8 * 8 * 48
    assert bad["places"][0]["patches"][0]["value"] == 48
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize("kind", ["student", "another bundle"])
def test_photographs_are_compared_with_a_reference(run, pytester, bundle, garbage, student, photos, kind):
    code = f"""
    def test_parity(assert_parity):
        assert_parity(reference={str(student if kind == "student" else bundle)!r}, images={str(photos)!r}, limit=2)
    """
    run(code, f"--phreg-bundle={bundle}").assert_outcomes(passed=1)
    outcome = run(code, f"--phreg-bundle={garbage}", "--phreg-artifacts=artifacts")
    outcome.assert_outcomes(failed=1)
    _, document = report(pytester, "parity")
    assert [len(comparison["images"]) for comparison in document["comparisons"]] == [1, 2]
    missed = [m for m in document["missed"] if m["places"] and m["places"][0]["image"].startswith("frame-")]
    assert {"cosine_p1", "cosine_min"} <= {m["gate"] for m in missed}
    assert all(m["places"][0]["patches"][0]["row"] == 0 for m in missed if m["gate"] == "cosine_min")


def test_bars_come_from_the_ini_the_command_line_and_the_call(run, pytester, int8_bundle):
    """An INT8 bundle passes its own gates; a bar of FP32 fails it, wherever the bar is given."""
    bundle = f"--phreg-bundle={int8_bundle}"
    run(PARITY, bundle).assert_outcomes(passed=1)
    strict = "phreg_cosine = 0.9999999999"
    code = PARITY.replace("assert_parity()", "assert_parity(cosine=1.0)")
    outcome = run(PARITY, bundle, f"--phreg-reference={int8_bundle}", "--phreg-images=nowhere")
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*images: got *nowhere, where there is nothing; expected a folder of images."])
    run(PARITY, bundle, ini=strict).assert_outcomes(**_exact(int8_bundle, 0.9999999999))
    run(PARITY, bundle, "-o", "phreg_cosine=0.5", ini=strict).assert_outcomes(passed=1)
    run(code, bundle).assert_outcomes(**_exact(int8_bundle, 1.0))


def _exact(folder, bar):
    """What a bar on the exam of a bundle should give: the exam's own figure decides, not a guess."""
    from phreg_deploy.runtime import FeatureExtractor
    from phreg_deploy.runtime.parity import run_exam

    with FeatureExtractor.load(folder, BACKEND) as extractor:
        figure = min(case.parity.cosine_p1 for case in run_exam(extractor.bundle, extractor.run))
    return {"passed": 1} if figure >= bar else {"failed": 1}


RATE = """
def test_rate(assert_artifact_rate):
    assert_artifact_rate()
"""


def test_the_artifact_rate_is_that_of_the_command(run, pytester, run_cli, bundle, tmp_path, photos):
    """Norms of a third patch token in four are tripled, so a quarter of the tokens are outliers."""
    broken = BrokenBundle(bundle, tmp_path / "loud.bundle")
    scale = np.ones((1, 8, 8), np.float32)
    scale[0, 2, ::4] = 40
    broken.give("token_norm", broken.node("Mul", broken.output("token_norm"), broken.constant(scale)))
    loud = broken.save()
    ini = f"phreg_images = '{photos}'\nphreg_artifact_rate = 0.02\nphreg_limit = 3"
    words = ("--phreg-artifacts=artifacts", "--junitxml", "report.xml")
    run(RATE, f"--phreg-bundle={loud}", *words, ini=ini).assert_outcomes(failed=1)
    path, document = report(pytester, "artifact_rate")
    told = run_cli("artifacts", loud, "--images", photos, "--limit", 3, "--backend", BACKEND, "--json").document
    assert document["norm_outliers"] == pytest.approx(told["norm_outliers"])
    (miss,) = document["missed"]
    assert miss["figure"] >= 2 / 64
    assert {(p["row"], p["column"]) for p in miss["places"][0]["patches"]} >= {(2, 0), (2, 4)}
    assert red(path.with_suffix(".png")) > 0.001
    run(RATE, f"--phreg-bundle={loud}", *words, "-o", "phreg_artifact_rate=1", ini=ini).assert_outcomes(passed=1)
    assert not path.exists(), "a pass removes the artifacts of an earlier failure"
    assert not path.with_suffix(".png").exists()


def test_latency_is_compared_with_bars_and_a_baseline(run, pytester, run_cli, bundle):
    code = """
    def test_latency(assert_latency):
        assert_latency(seconds=0.02{more})
    """
    words = (f"--phreg-bundle={bundle}", "--phreg-artifacts=artifacts")
    loose = run(code.format(more=", ms=1e6, p99_ms=1e6"), *words, "--junitxml", "report.xml")
    loose.assert_outcomes(passed=1)
    assert 'name="phreg.latency.extractor.p50_ms"' in (pytester.path / "report.xml").read_text()
    outcome = run(code.format(more=""), *words, ini="phreg_latency_ms = 1e-6")
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*latency_p50: the median of a call took * ms (batch 1 at 64x64), expected at most*"])
    _, document = report(pytester, "latency")
    assert len(document["attempts"]) == 3
    told = run_cli("profile", bundle, "--backend", BACKEND, "--seconds", 0.1, "--json").document
    for speed, expected in ((1e6, "passed"), (1e-6, "failed")):
        for result in told["results"]:
            result["extractor"]["p50"] = speed
        (pytester.path / "before.json").write_text(json.dumps(told))
        outcome = run(code.format(more=""), *words, ini="phreg_baseline = 'before.json'")
        outcome.assert_outcomes(**{expected: 1})
    outcome.stdout.fnmatch_lines(["*latency_baseline: batch 1 at 64x64: * the baseline's * expected at most 1.1x*"])
    told["conditions"]["processor"] = "another"
    (pytester.path / "before.json").write_text(json.dumps(told))
    outcome = run(code.format(more=", baseline='before.json'"), *words)
    outcome.stdout.fnmatch_lines(["*before.json was measured under other conditions: processor: another in the*"])


MIOU = """
def test_miou(assert_miou):
    assert_miou(limit=6{more})
"""


def test_the_mean_iou_is_that_of_the_labels(run, pytester, labels_bundle, demo_scenes):
    from phreg_deploy.runtime import FeatureExtractor

    words = (f"--phreg-images={demo_scenes}/images", f"--phreg-masks={demo_scenes}/masks")
    words = (f"--phreg-bundle={labels_bundle}", "--phreg-artifacts=artifacts", *words)
    outcome = run(MIOU.format(more=", at_least=0.99"), *words)
    outcome.assert_outcomes(failed=1)
    path, document = report(pytester, "miou")
    names = sorted(p.name for p in (demo_scenes / "images").iterdir())[:6]
    with FeatureExtractor.load(labels_bundle, BACKEND) as extractor:
        found = np.stack([extractor(demo_scenes / "images" / name).labels[0] for name in names])
    truth = np.stack([np.asarray(Image.open(demo_scenes / "masks" / name)) for name in names])
    occurring = np.unique(truth)
    ious = [((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in occurring]
    assert document["miou"] == pytest.approx(np.mean(ious))
    place = document["missed"][0]["places"][0]
    number, patch = names.index(place["image"]), place["patches"][0]
    tile = np.s_[number, 8 * patch["row"] : 8 * patch["row"] + 8, 8 * patch["column"] : 8 * patch["column"] + 8]
    assert place["grid"] == [16, 16]
    assert patch["value"] == pytest.approx((found[tile] != truth[tile]).mean())
    assert path.with_suffix(".png").is_file()
    run(MIOU.format(more=""), *words, ini=f"phreg_miou = {np.mean(ious) - 0.001}").assert_outcomes(passed=1)
    run(MIOU.format(more=", head='labels'"), *words, "-o", "phreg_miou=0.1").assert_outcomes(passed=1)
    outcome = run(MIOU.format(more=", head='depth'"), *words, "-o", "phreg_miou=0.1")
    outcome.stdout.fnmatch_lines(["*got the head 'depth', expected one of labels."])


def test_logits_are_enlarged_to_the_mask(
    run, run_cli, pytester, labels_bundle, demo_bundle, demo_training, demo_scenes
):
    """A bundle that serves logits of patches has the mean IoU of one that serves the same head's labels of pixels."""
    logits = pytester.path / "logits.bundle"
    assert run_cli("attach", demo_bundle, "--head", demo_training / "head", "-o", logits, "--quiet").code == 0
    words = (f"--phreg-images={demo_scenes}/images", f"--phreg-masks={demo_scenes}/masks")
    figures = []
    for bundle in (logits, labels_bundle):
        run(MIOU.format(more=", at_least=0.0"), f"--phreg-bundle={bundle}", *words, "--junitxml=report.xml")
        tree = ElementTree.parse(pytester.path / "report.xml")
        found = {p.get("name"): p.get("value") for p in tree.iter("property")}
        figures.append(float(found["phreg.miou.miou"]))
        assert found["phreg.miou.head"] == ("segmentation" if bundle == logits else "labels")
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)
