"""Serve a few frames under NVIDIA's compute-sanitizer, which finds accesses outside of memory and leaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from phreg_deploy.selftest.archive import Archive
from phreg_deploy.selftest.checks import Failed, Skipped

TOOL = "compute-sanitizer"
# Where JetPack and the CUDA toolkit put it without adding it to PATH.
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
# The exit code that the tool is asked to give for errors that it finds; ours are 0 to 4, 130 and 143.
FOUND = 86
# Seconds: the tool slows kernels down tenfold and more.
LIMIT = 600
FRAMES = 3


def check_memory_accesses(folder: Path, device: int, archive: Archive) -> str:
    """Run ``serve`` in a process under the tool, and store what it prints."""
    tool = shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(FOLDERS))
    if tool is None:
        raise Skipped(f"{TOOL} is not installed; it comes with the CUDA toolkit.")
    command = [tool, "--tool", "memcheck", "--leak-check", "full", "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "phreg_deploy.selftest.sanitizer", str(folder), str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise Skipped(f"{TOOL} was not done after {LIMIT} s.") from None
    except OSError as error:
        raise Skipped(f"{TOOL} cannot be started: {error}.") from None
    archive.add("compute-sanitizer.txt", done.stdout + done.stderr)
    summary = next((line.strip("= ") for line in reversed(done.stdout.splitlines()) if "ERROR SUMMARY" in line), "")
    if done.returncode == FOUND:
        raise Failed(f"{TOOL} found errors: {summary}; see compute-sanitizer.txt in the archive.")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Failed(f"the process under {TOOL} ended with exit code {done.returncode}: {last}")
    return f"{FRAMES} frames of the host and {FRAMES} on the GPU; {summary or 'no errors'}"


def serve(folder: Path, device: int) -> None:
    """Serve frames of the host (plain, captured, replayed) and frames on the GPU at an address that is not aligned."""
    from phreg_deploy.export.engine.exam import uploaded
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.selftest.engines import ON_DEVICE
    from phreg_deploy.selftest.serving import frames

    with FeatureExtractor.load(folder, "tensorrt", device=device) as extractor:
        for batch in frames(extractor, FRAMES):
            extractor.run(batch)
            with uploaded(extractor.opened.cuda, batch, max(ON_DEVICE.values())) as array:
                for value in extractor.run(array).values():
                    value.numpy()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
