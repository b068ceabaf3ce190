"""Where the pytest plugin takes its settings from, what it refuses, where artifacts go, and what it loads."""

import re
import shutil

import pytest

from phreg_deploy.pytest_plugin.options import OPTIONS, SETTINGS
from tests.cli_helpers import ROOT, run_python
from tests.plugin_runs import PARITY, PLUGIN

pytestmark = pytest.mark.usefixtures("torch")


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
        ("assert_latency(BUNDLE, ms=5, image_size='7x7')", "7x7"),
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


def test_without_a_cache_artifacts_go_to_the_temporary_folder(run, pytester, garbage, tmp_path):
    words = (f"--phreg-bundle={garbage}", f"--basetemp={tmp_path / 'base'}")
    run(PARITY, *words, "-p", "no:cacheprovider").assert_outcomes(failed=1)
    assert (tmp_path / "base" / "phreg-deploy" / "test_model.py-test_parity" / "parity.png").is_file()
    (pytester.path / "in-the-way").write_text("")
    outcome = run(PARITY, *words, "--phreg-artifacts=in-the-way")
    outcome.stdout.fnmatch_lines(["output: *in-the-way*parity.png cannot be written*"])


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
    # Plugins of other packages, such as zarr's, import numpy.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
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
