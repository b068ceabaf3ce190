"""Fetch what the tests of TensorRT need: NVIDIA's Python bindings, and the parser and builder of TensorRT for RTX.

``python -m tests.nvidia_wheels [FOLDER]`` downloads the wheels for the running Python with pip and unpacks them. The
bindings alone show which names each version of TensorRT has; the libraries for RTX parse graphs and build engines
without a GPU. No package of this project contains these files.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.downloading import download_all

BINDINGS = "tensorrt-cu12-bindings"
# Of JetPack 6.2, of JetPack 7.2, and the newest.
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
RTX, RTX_VERSION = "onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5.0"
# Bindings of the lean runtime, which runs engines and builds none.
LEAN = "tensorrt-lean-cu12-bindings"
WANTED = {
    **{version: (BINDINGS, version) for version in VERSIONS},
    "lean": (LEAN, VERSIONS[-1]),
    "rtx": (RTX, RTX_VERSION),
}


def default_folder() -> Path:
    """The folder in which the tests look: ``PHREG_NVIDIA``, or ``.nvidia`` at the root of the repository."""
    return Path(os.environ.get("PHREG_NVIDIA") or Path(__file__).resolve().parent.parent / ".nvidia")


def fetch(folder: Path, name: str) -> str:
    """Unpack one wheel into ``folder / name`` unless it is there; return a sentence with the outcome."""
    package, version = WANTED[name]
    target, label = folder / name, f"{package} {version}"
    if target.is_dir():
        return f"{label}: is in {target}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        # Only wheels: without one for this Python, pip would build a placeholder that downloads gigabytes.
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", made]
        command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(made).glob("*.whl"))
        if done.returncode or not wheels:
            return f"{label}: not available, {_reason(done.stderr, version)}"
        unpacked = Path(made) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        shutil.move(unpacked, target)
    return f"{label}: unpacked into {target}"


def _reason(said: str, version: str) -> str:
    """Explain why pip has no wheel, from what it wrote to stderr."""
    here = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.strip()]
    if "No module named pip" in said:
        return f"{sys.executable} has no pip."
    if any(sign in said for sign in ("NewConnectionError", "ConnectTimeout", "name resolution", "Connection refused")):
        return "pip reaches no index; is there a network?"
    if "No matching distribution" in said:
        listed = next(
            (line.partition("(from versions: ")[2].rstrip(")") for line in lines if "from versions:" in line), "none"
        )
        if listed == "none":
            return f"pip finds no wheel of it at all for {here}; is there a network?"
        return f"there is no wheel of {version} for {here}; those there are: {listed}."
    return lines[-1] if lines else "pip wrote no wheel and no reason."


if __name__ == "__main__":
    download_all(__doc__.splitlines()[0], default_folder(), WANTED, fetch)
