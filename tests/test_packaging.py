"""The wheel contains every file of the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(made_once):
    pytest.importorskip("build")
    return next(made_once("wheel", make_wheel).glob("*.whl"))


def make_wheel(out):
    """Build from a copy: pip writes build folders beside the sources, and other tests read those at the same time."""
    source = out.with_name("sources")
    shutil.copytree(ROOT / "phreg_deploy", source / "phreg_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("export", "runtime", "calibration"):
        (source / name).symlink_to(source / "phreg_deploy" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode and "setuptools" in process.stderr:
        pytest.skip("setuptools is not in this environment")
    assert process.returncode == 0, process.stderr


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
