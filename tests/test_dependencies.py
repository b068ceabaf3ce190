"""Every dependency is used, declared and compatible with Apache-2.0, and an SBOM lists what is installed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import venv
from importlib import metadata

import pytest

from tests.cli_helpers import ROOT


def test_every_import_is_declared_and_every_declared_package_is_imported():
    """What is used without an import is in pyproject.toml's table of deptry, with the reason."""
    pytest.importorskip("deptry")
    done = subprocess.run(
        [sys.executable, "-m", "deptry", ".", "--no-ansi"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_licence_of_every_dependency_is_listed_and_compatible():
    pytest.importorskip("license_expression")
    from tests.dependency_licences import TOOLS, extras, is_compatible, name_of, rows, written

    listed = written()
    for name, (licence, used) in rows().items():
        assert name in listed, f"{name} is not in docs/licences.md; run python -m tests.dependency_licences"
        served = sorted(set(used) - set(TOOLS))
        assert not served or is_compatible(licence), f"{name}: {licence}, brought by {served}"
    for requirement in (requirement for group in extras().values() for requirement in group):
        assert name_of(requirement.name) in listed
    for name, (licence, used) in listed.items():
        assert set(used) <= set(TOOLS) or is_compatible(licence), (name, licence)


@pytest.mark.parametrize(
    ("expression", "compatible"),
    [
        ("MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("Apache-2.0 WITH LLVM-exception AND BSL-1.0", True),
        ("AGPL-3.0-or-later", False),
        ("None", False),
    ],
)
def test_compatibility_follows_the_expression(expression, compatible):
    pytest.importorskip("license_expression")
    from tests.dependency_licences import is_compatible

    assert is_compatible(expression) == compatible


def test_make_sbom_writes_valid_cyclonedx(tmp_path):
    """On an environment with three packages: this one takes a minute."""
    pytest.importorskip("cyclonedx_py")
    from cyclonedx.model.bom import Bom

    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    for name in ("click", "numpy", "onnxruntime"):
        place = metadata.distribution(name)._path
        shutil.copytree(place, packages / place.name)
    recipe = re.search(r"^sbom:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    words = shlex.split(recipe.replace("\\\n", " "))
    assert words[0] == "$(BIN)/cyclonedx-py"
    words = [word.replace("$(BIN)/python", str(tmp_path / "env" / "bin" / "python")) for word in words[1:]]
    words[words.index("sbom.json")] = str(tmp_path / "sbom.json")
    command = [sys.executable, "-m", "cyclonedx_py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "sbom.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    bom = Bom.from_json(document)
    assert bom.metadata.component.name == "phreg-deploy"
    assert {component.name for component in bom.components} == {"click", "numpy", "onnxruntime"}
    assert all(component.licenses and component.purl for component in bom.components)
    assert str(tmp_path) not in json.dumps(document)
