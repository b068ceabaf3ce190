"""The sdist holds the tests, and the wheel that is built from it every file of the package."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(made_once):
    pytest.importorskip("build")
    return made_once("dist", make_dist)


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


def make_dist(out):
    """Build the sdist, and the wheel from it, from a copy: setuptools writes beside the sources, which others read."""
    source = out.with_name("sources")
    shutil.copytree(ROOT / "phreg_deploy", source / "phreg_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("export", "runtime", "calibration"):
        (source / name).symlink_to(source / "phreg_deploy" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode and "Missing dependencies" in process.stdout + process.stderr:
        pytest.skip("setuptools is not in this environment")
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr


def test_the_wheel_holds_every_module_and_the_embedded_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "phreg_deploy"
    expected = {str(p.relative_to(ROOT)) for p in package.rglob("*.py") if "__pycache__" not in p.parts}
    expected |= {f"phreg_deploy/demo/model/{name}" for name in ("config.json", "model.safetensors")} | {
        "phreg_deploy/py.typed"
    }
    assets = package / "explorer" / "assets"
    expected |= {str(p.relative_to(ROOT)) for p in assets.iterdir()}
    assert len(list(assets.glob("*.js"))) == 5
    assert expected <= names
    (entry_points,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "[pytest11]\nphreg_deploy.pytest_plugin = phreg_deploy.pytest_plugin" in text
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "calibration/", "export/", "runtime/"))]


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 6 * 2**20


def test_the_sdist_holds_all_that_the_tests_need(dist):
    """``make elsewhere`` runs them against the wheel in an environment without torch."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tests = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert tests <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "phreg_deploy/py.typed"} <= names
    assert not {name for name in names if name.startswith(("benchmarks/", "export/", "runtime/", "calibration/"))}
