"""Programs of users pass mypy --strict: the public functions have types, and no result is Any."""

import re
import subprocess
import sys

import pytest

from tests.cli_helpers import ROOT
from tests.test_readme import PAGES, code_blocks, position

pytest.importorskip("mypy")
# What `strict` has, and pyproject.toml turns off for this project's own calls into libraries without types. The options
# of the project's modules stay as they are, so that the cache of `make lint` serves.
STRICT = "# mypy: disallow-any-generics, disallow-subclassing-any, warn-return-any\n"
# Pages whose Python is a file of tests.
TESTS = ("ci.md",)
# torch does not list this function as public; the other module is a Jetson's.
OTHERS = ('Module "torch" does not explicitly export attribute "from_dlpack"', 'module named "jetson_utils"')
ARRAY = "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"
PROGRAM = """
import numpy as np
from phreg_deploy.calibration import calibrate
from phreg_deploy.distill import distill
from phreg_deploy.export import export
from phreg_deploy.profiling import profile
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.sharing import push
from phreg_deploy.stream import Stream
from phreg_deploy.verify import check, score_artifacts

with FeatureExtractor.load("student.bundle", backend="openvino", threads=2) as extractor:
    dense = extractor("photo.jpg")
    reveal_type(dense)
    reveal_type(dense.features)
    reveal_type(dense.cls)
    reveal_type(dense.artifact_rate)
    reveal_type(dense.layers)
    reveal_type(extractor.run(np.zeros((1, 224, 224, 3), np.uint8)))
    reveal_type(extractor.backend)
    with Stream(extractor, "video.mp4") as stream:
        for result in stream:
            reveal_type(result.dense)
record = distill("vit_tiny_patch16_224", "photos", "student", epochs=1)
reveal_type(record)
reveal_type(record.scores)
reveal_type(export("student", "student.bundle"))
reveal_type(calibrate("student.bundle", "photos", "int8.bundle"))
reveal_type(check("student.bundle"))
reveal_type(score_artifacts("student", "photos"))
reveal_type(profile("student.bundle"))
reveal_type(push("student.bundle", "org/name"))
"""
P = "phreg_deploy"
REVEALED = [
    f"{P}.runtime.dense_features.DenseFeatures",
    ARRAY,
    f"{ARRAY} | None",
    ARRAY,
    f"typing.Mapping[int, {P}.runtime.dense_features.LayerFeatures]",
    f"dict[str, {ARRAY}]",
    "str",
    f"{P}.runtime.dense_features.DenseFeatures",
    f"{P}.distill.record.StudentRecord",
    f"{P}.distill.record.StudentScores | None",
    f"{P}.bundle.bundle.Bundle",
    f"{P}.calibration.report.CalibrationReport",
    f"{P}.verify.report.CheckReport",
    f"{P}.verify.report.ArtifactReport",
    f"{P}.profiling.report.ProfileReport",
    f"{P}.sharing.contents.Pushed",
]


def run_mypy(*files):
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_users_programs_and_the_docs_are_typed(tmp_path):
    """One run of mypy, which takes 2 s after `make lint` and 30 s before it."""
    program = tmp_path / "program.py"
    program.write_text(STRICT + PROGRAM)
    files, places = [program], {"program.py": "the program of this test"}
    for page in PAGES:
        for line, code, _ in code_blocks(page, "python") if page.name not in TESTS else ():
            files.append(tmp_path / f"block_{len(files)}.py")
            files[-1].write_text(STRICT + code)
            places[files[-1].name] = position(page, line)
    assert len(files) > 15
    lines = run_mypy(*files)
    errors = [line for line in lines if ": error: " in line and not any(other in line for other in OTHERS)]
    assert not errors, [f"{places.get(error.split('/')[-1].split(':')[0])}: {error}" for error in errors]
    assert re.findall(r'Revealed type is "(.*)"$', "\n".join(lines), re.M) == REVEALED
