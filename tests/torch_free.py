"""Install the project as a user does, without torch, and run the tests that need none there: ``make elsewhere``.

The wheel is built from the sdist, installed into a new environment, and tested from a copy of ``tests/`` alone. This
environment, which has torch, makes the bundles first. ``--lowest`` installs the lowest version of every dependency
that pyproject.toml allows, ``make lowest``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What serves, calibrates, shares and signs without torch. Zarr needs Python 3.11.
EXTRAS = ("cpu", "openvino", "calibration", "evaluate", "hub", "sign", "serve", "parquet", "zarr", "video", "pytest")
# What tests import beside these.
TOOLS = ("filelock>=3.12", "pytest-xdist>=3.6", "av>=12", "httpx>=0.27")
TORCH = ("torch", "timm", "onnxscript")
FILES = [
    "archives",
    "artifacts",
    "atomic",
    "auto",
    "bad_bundles",
    "bad_exams",
    "bad_graphs",
    "borrowed_arrays",
    "cards",
    "extraction",
    "extraction_formats",
    "fit",
    "graph_facts",
    "hub",
    "image_inputs",
    "latency_gate",
    "lent_arrays",
    "load",
    "manifest",
    "older_manifests",
    "openvino",
    "parity",
    "patch_errors",
    "photographs",
    "quantisation",
    "roofline",
    "saturation",
    "serve",
    "serve_clients",
    "serve_process",
    "serve_under_load",
    "sharded_extraction",
    "signing",
    "stream",
    "stream_sources",
    "telemetry",
    "temporary",
    "tiling",
    "views",
    "watch",
    "windows",
]


def run(*words: object, **options: object) -> None:
    """Run a command; its failure ends this process with its exit code."""
    sys.stderr.write(f"+ {' '.join(map(str, words))}\n")
    code = subprocess.run([str(word) for word in words], check=False, **options).returncode  # type: ignore[call-overload]
    if code:
        sys.exit(code)


def install(python: Path, *words: object) -> None:
    """Install with pip's words into the environment of ``python``."""
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *words)


def make_environment(folder: Path, version: str, lowest: bool, extras: Sequence[str] = EXTRAS) -> Path:
    """Make ``folder/venv`` with what ``extras`` and ``TOOLS`` need, without the project; return its Python.

    Args:
        version: of Python, or the path of one.
        lowest: install the lowest versions that are allowed, in place of the newest.
    """
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", version, folder / "venv")
    python, versions, tools = folder / "venv" / "bin" / "python", folder / "requirements.txt", folder / "tools.in"
    tools.write_text("\n".join(TOOLS) + "\n")
    chosen = [word for extra in extras for word in ("--extra", extra)]
    how = "lowest-direct" if lowest else "highest"
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--resolution", how, "--python", python]
    run(*uv, *chosen, ROOT / "pyproject.toml", tools, "-o", versions, stdout=subprocess.DEVNULL)
    install(python, "-r", versions)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lowest", action="store_true", help="install the lowest versions that are allowed")
    parser.add_argument("--python", default=f"3.{sys.version_info.minor}", help="its version, or its path")
    parser.add_argument("--made", type=Path, help="folder of fixtures that an earlier run made")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = (arguments.made or folder / "made").absolute()
        made.mkdir(exist_ok=True)
        run(
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            folder / "dist",
            ROOT,
            stdout=subprocess.DEVNULL,
        )
        environment = {**os.environ, "PHREG_MADE": str(made), "OMP_NUM_THREADS": "1"}
        pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
        run(sys.executable, *pytest, ROOT / "tests" / "test_made_fixtures.py", cwd=ROOT, env=environment)
        python = make_environment(folder, arguments.python, arguments.lowest)
        (wheel,) = (folder / "dist").glob("*.whl")
        install(python, "--no-deps", wheel)
        elsewhere = folder / "elsewhere"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", elsewhere)
        # What the tests there make themselves is of other versions.
        environment["PHREG_MADE"] = str(shutil.copytree(made, folder / "lent"))
        environment["PYTHONPATH"] = str(elsewhere)
        installed = (
            f"import phreg_deploy, sys; assert sys.prefix in phreg_deploy.__file__, phreg_deploy.__file__; {ABSENT}"
        )
        run(python, "-c", installed, cwd=elsewhere, env=environment)
        files = [f"tests/test_{file}.py" for file in FILES]
        run(python, *pytest, "-W", "default", *files, *more, cwd=elsewhere, env=environment)


ABSENT = f"import importlib.util as u; assert not [n for n in {TORCH} if u.find_spec(n)]"

if __name__ == "__main__":
    main()
