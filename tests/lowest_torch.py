"""Run the tests that need torch with the lowest versions that pyproject.toml allows: a part of ``make lowest``.

``tests.torch_free --lowest`` tests the other dependencies. Zarr needs Python 3.11.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tests.torch_free import ROOT, install, make_environment, run

EXTRAS = ("cpu", "distill", "export", "calibration", "evaluate", "openvino", "text", "parquet", "zarr", "ray", "pytest")
FILES = [
    "attach",
    "averaged_weights",
    "bad_models",
    "calibrate_command",
    "calibration",
    "cli",
    "damaged_models",
    "export",
    "external_weights",
    "extraction_formats",
    "extraction_on_ray",
    "fake_quantisation",
    "families",
    "final_norm",
    "folding",
    "heads",
    "layer_bundles",
    "micro_batches",
    "narrowing",
    "positions",
    "processes",
    "readouts",
    "register_neurons",
    "replicas",
    "rotary",
    "served_layers",
    "short_tokens",
    "sinder",
    "singular_values",
    "student",
    "student_scores",
    "target_cache",
    "teacher",
    "text",
    "text_heads",
    "torchrun",
    "trained_layers",
    "training",
    "transplant",
    "verify",
    "zero_shot",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.11", help="its version, or its path")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        python = make_environment(Path(name), arguments.python, True, EXTRAS)
        install(python, "--no-deps", "--editable", ROOT)
        # What the tests make is of these versions, and commands that they start are of this environment.
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("PHREG_MADE", None)
        files = [f"tests/test_{file}.py" for file in FILES]
        pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "auto", "--dist", "worksteal")
        run(python, *pytest, *files, *more, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main()
