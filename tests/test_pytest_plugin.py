"""The pytest plugin in runs of pytest of its own: verdicts, messages, artifacts, properties, settings and refusals."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.pytest_plugin import artifact_rate, latency, miou, parity  # noqa: F401  (pytester forgets new modules)
from phreg_deploy.pytest_plugin.options import OPTIONS, SETTINGS
from tests.broken_bundles import BrokenBundle, add_garbage_token, scale_outputs
from tests.cli_helpers import ROOT, run_python

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("torch")
PLUGIN = ("-p", "phreg_deploy.pytest_plugin", "-p", "no:randomly")
BACKEND = "onnxruntime-cpu"


@pytest.fixture
def garbage(bundle, tmp_path):
    """A copy of the small bundle whose first patch token is noise."""
    broken = BrokenBundle(bundle, tmp_path / "garbage.bundle")
    add_garbage_token(broken)
    return broken.save()


@pytest.fixture
def run(pytester):
    """Write a test file and the ini file, and run pytest on them; returns the outcome."""

    def runner(code, *words, ini=""):
        pytester.makepyfile(test_model=code)
        pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\nphreg_backend = '{BACKEND}'\n{ini}\n")
        return pytester.runpytest_inprocess(*PLUGIN, *map(str, words))

    return runner


PARITY = """
def test_parity(assert_parity):
    assert_parity()
"""


def report(pytester, name):
    """The JSON of a failure, below the folder ``artifacts``; NaN and infinity are refused."""
    (path,) = (pytester.path / "artifacts").rglob(f"{name}.json")

    def refuse(word):
        raise ValueError(word)

    return path, json.loads(path.read_text(), parse_constant=refuse)


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


def test_the_mean_iou_is_that_of_the_labels(run, pytester, labels_bundle, demo_scenes, tmp_path):
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


NOTHING = """
def test_it({name}):
    {call}
"""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("assert_parity()", "no bundle: give the path of a bundle to the call, by --phreg-bundle, or as phreg_bundle"),
        ("assert_parity('none.bundle')", "bundle: got none.bundle, where there is nothing"),
        ("assert_parity(BUNDLE, cosine=1.5)", "cosine: got 1.5, expected a number from 0 up to 1."),
        ("assert_parity(BUNDLE, reference='student')", "no images: give the folder of photographs"),
        ("assert_parity(BUNDLE, images='photos')", "images are for a comparison with a reference"),
        ("assert_parity(BUNDLE, backend='tpu')", "tpu"),
        ("assert_artifact_rate(BUNDLE, '.')", "no bar; give at_most to the call, or phreg_artifact_rate in the ini."),
        ("assert_artifact_rate(BUNDLE, '.', at_most=1, limit=0)", "limit: got 0, expected a whole number from 1."),
        ("assert_latency(BUNDLE)", "no bar; give ms, p99_ms or baseline"),
        ("assert_latency(BUNDLE, ms=5, image_size=(7, 7))", "7x7"),
        ("assert_miou(BUNDLE, 'a', 'b')", "no bar; give at_least"),
        ("assert_miou(BUNDLE, 'a', 'b', at_least=0.5)", "the bundle has no head for classes"),
    ],
)
def test_bad_input_is_a_message_without_traceback(run, bundle, call, message):
    code = NOTHING.format(name=call.partition("(")[0], call=call.replace("BUNDLE", repr(str(bundle))))
    outcome = run(code)
    outcome.assert_outcomes(failed=1)
    text = outcome.stdout.str()
    assert message in " ".join(text.split())
    assert "Traceback" not in text
    assert "phreg_deploy/" not in text


def test_a_damaged_bundle_and_a_wrong_ini_value_are_messages(run, world):
    damaged = world.copy("bundle", model=lambda data: data[:-9])
    run(PARITY, f"--phreg-bundle={damaged}").stdout.fnmatch_lines(
        ["bundle: *has another sha256 than manifest.json says*"]
    )
    outcome = run(PARITY, f"--phreg-bundle={world.bundle}", ini="phreg_cosine = 'high'")
    outcome.stdout.re_match_lines([r".*(got 'high'|phreg_cosine in the ini.*'high').*expected a number.*"])


def test_artifacts_go_to_the_cache_and_calls_of_one_test_apart(run, pytester, garbage, bundle):
    code = f"""
    import pytest

    @pytest.mark.parametrize("size", ["64 px"])
    def test_parity(assert_parity, size):
        assert_parity({str(bundle)!r})
        with pytest.raises(AssertionError, match="cosine_min"):
            assert_parity({str(garbage)!r})
        assert_parity({str(garbage)!r})
    """
    run(code).assert_outcomes(failed=1)
    folder = pytester.path / ".pytest_cache" / "d" / "phreg-deploy" / "test_model.py-test_parity[64-px]"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"parity-{number}.{suffix}" for number in (2, 3) for suffix in ("json", "png")
    ]


def test_paths_of_the_ini_are_relative_to_the_root_and_of_the_command_line_to_the_folder(pytester, bundle, monkeypatch):
    shutil.copytree(bundle, pytester.path / "model.bundle")
    below = pytester.mkdir("tests")
    (below / "test_model.py").write_text(PARITY)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\nphreg_bundle = 'model.bundle'\n")
    monkeypatch.chdir(below)
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)
    pytester.runpytest_inprocess(*PLUGIN, "--phreg-bundle=../model.bundle").assert_outcomes(passed=1)
    pytester.runpytest_inprocess(*PLUGIN, "--phreg-bundle=model.bundle").assert_outcomes(failed=1)


LIGHT = """
import sys
import pytest
before = set(sys.modules)
import phreg_deploy.pytest_plugin
print(*sorted(set(sys.modules) - before))
"""


def test_the_plugin_imports_nothing_but_itself_until_a_test_uses_it():
    assert run_python(LIGHT).split() == [
        "phreg_deploy",
        "phreg_deploy.pytest_plugin",
        "phreg_deploy.pytest_plugin.options",
    ]


def test_a_run_that_does_not_use_it_loads_nothing_more(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(
        """
        import sys

        def test_nothing():
            heavy = {"numpy", "PIL", "click", "rich", "onnxruntime", "openvino", "torch", "phreg_deploy.runtime"}
            assert not heavy & set(sys.modules)
        """
    )
    outcome = pytester.runpytest_subprocess(*PLUGIN, "-W", "error", "--strict-config", "--strict-markers")
    outcome.assert_outcomes(passed=1)


def test_a_path_in_a_word_of_its_own_is_refused(pytester, bundle, monkeypatch):
    """pytest would take the path for the place of its ini file, whose settings were then ignored without a word."""
    expected = ["ERROR: got --phreg-bundle VALUE, expected an equals sign: --phreg-bundle=VALUE."]
    pytester.makepyfile(PARITY)
    outcome = pytester.runpytest_inprocess(*PLUGIN, "--phreg-bundle", bundle)
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    outcome.stderr.fnmatch_lines(expected)
    monkeypatch.setenv("PYTEST_ADDOPTS", f"--phreg-bundle {bundle}")
    pytester.runpytest_inprocess(*PLUGIN).stderr.fnmatch_lines(expected)


def test_the_help_lists_every_setting(pytester):
    text = " ".join(pytester.runpytest_inprocess(*PLUGIN, "--help").stdout.str().split())
    for name in SETTINGS:
        assert f"phreg_{name} (" in text
    for name in OPTIONS:
        assert f"--phreg-{name}=" in text


def test_the_page_of_the_plugin_names_every_setting_and_no_other():
    page = (ROOT / "docs" / "ci.md").read_text()
    assert set(re.findall(r"\bphreg_([a-z0-9_]+)", page)) - {"deploy"} == set(SETTINGS)


def test_the_entry_point_has_the_modules_name():
    """So that ``-p phreg_deploy.pytest_plugin`` finds the plugin that is registered already."""
    assert (
        '\n[project.entry-points.pytest11]\n"phreg_deploy.pytest_plugin" = "phreg_deploy.pytest_plugin"\n'
        in (ROOT / "pyproject.toml").read_text()
    )
