"""Time an engine by NVIDIA's own ``trtexec``, which a table of ours is held against."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

# Where Debian packages of TensorRT, JetPack's among them, put it without adding it to PATH.
FOLDERS = "/usr/src/tensorrt/bin"
# A line of its summary, e.g. "[I] GPU Compute Time: min = 0.9 ms, max = 1.2 ms, mean = 1 ms, median = 1.01 ms, ...".
SUMMARY = re.compile(r"GPU Compute Time: .*?median = ([\d.]+) ms")


def time_engine(plan: Path, seconds: float) -> tuple[float | None, str]:
    """Return the median milliseconds of the engine alone, replayed as a CUDA graph, and why there are none.

    The engine has one profile of one shape, so trtexec needs no shapes. Copies from and to the host do not count.
    """
    tool = shutil.which("trtexec") or shutil.which("trtexec", path=FOLDERS)
    if tool is None:
        return None, "trtexec is not installed; JetPack and NVIDIA's archives of TensorRT have it, the wheel does not."
    command = [tool, f"--loadEngine={plan}", "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
    command += ["--warmUp=500", f"--duration={max(1, round(seconds))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"trtexec: {error}"
    found = SUMMARY.search(done.stdout)
    if done.returncode or found is None:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "[E]" in line] or ["no summary"]
        return None, f"trtexec: exit code {done.returncode}, {lines[0].strip()}"
    return float(found[1]), ""
