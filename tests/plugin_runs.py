"""Run pytest on a test file with the plugin, for the tests of the plugin."""

import json

import pytest

PLUGIN = ("-p", "phreg_deploy.pytest_plugin")
BACKEND = "onnxruntime-cpu"
PARITY = """
def test_parity(assert_parity):
    assert_parity()
"""


@pytest.fixture
def run(pytester):
    """Write a test file and the ini file, and run pytest on them; returns the outcome."""
    # pytester forgets the modules that a run imports; these stay, because some cannot be imported twice.
    from phreg_deploy.pytest_plugin import artifact_rate, latency, miou, parity  # noqa: F401

    def runner(code, *words, ini=""):
        pytester.makepyfile(test_model=code)
        pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\nphreg_backend = '{BACKEND}'\n{ini}\n")
        return pytester.runpytest_inprocess(*PLUGIN, *map(str, words))

    return runner


@pytest.fixture
def garbage(bundle, tmp_path):
    """A copy of the small bundle whose first patch token is noise."""
    from tests.broken_bundles import BrokenBundle, add_garbage_token

    broken = BrokenBundle(bundle, tmp_path / "garbage.bundle")
    add_garbage_token(broken)
    return broken.save()


def report(pytester, name):
    """The JSON of a failure, below the folder ``artifacts``; NaN and infinity are refused."""
    (path,) = (pytester.path / "artifacts").rglob(f"{name}.json")

    def refuse(word):
        raise ValueError(word)

    return path, json.loads(path.read_text(), parse_constant=refuse)
