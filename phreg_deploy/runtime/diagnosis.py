"""What is installed, what is usable rather than merely listed, and the line that mends what is not."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from phreg_deploy.spec import Stored


@dataclass(frozen=True)
class Finding(Stored):
    """``state`` in words; ``usable``; ``mend``: what to type, None where nothing is wrong."""

    part: str
    state: str
    usable: bool
    purpose: str
    mend: str | None = None


def diagnose() -> list[Finding]:
    """Every part that a command needs, in the order of the pipeline."""
    return [
        _python(),
        _torch(),
        _plain("onnx", "export", "export, calibrate"),
        _plain("onnxscript", "export", "export"),
        _onnxruntime(),
        _openvino(),
        _driver(),
    ]


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.machine()}", True, "everything")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(package: str, extra: str, purpose: str) -> Finding:
    found = _installed(package)
    if found is None:
        return Finding(package, "not installed", False, purpose, f'pip install "phreg-deploy[{extra}]"')
    return Finding(package, found, True, purpose)


def _torch() -> Finding:
    """timm imports torchvision, whose wheel fits one build of torch only; asked in a process of its own, so that this one stays light."""
    missing = [p for p in ("torch", "timm", "safetensors") if _installed(p) is None]
    purpose = "distill, export"
    if missing:
        return Finding(
            "torch + timm", f"{', '.join(missing)} not installed", False, purpose, 'pip install "phreg-deploy[distill]"'
        )
    versions = f"torch {_installed('torch')}, timm {_installed('timm')}"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", "import timm, torch; print(torch.cuda.is_available())"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "torch + timm",
            f"{versions}; importing them takes over two minutes",
            False,
            purpose,
            "run: python -c 'import timm'",
        )
    if tried.returncode == 0:
        return Finding(
            "torch + timm",
            f"{versions}; CUDA {'usable' if tried.stdout.strip().endswith('True') else 'not usable'}",
            True,
            purpose,
        )
    if "torchvision::nms" in tried.stderr:
        return Finding(
            "torch + timm",
            f"{versions}; torchvision was built against another torch",
            False,
            purpose,
            "pip install --force-reinstall torch torchvision",
        )
    last = tried.stderr.strip().splitlines()[-1:] or ["no message"]
    return Finding(
        "torch + timm",
        f"{versions}; import fails: {last[0][:120]}",
        False,
        purpose,
        'pip install --force-reinstall "phreg-deploy[distill]"',
    )


def _onnxruntime() -> Finding:
    both = [p for p in ("onnxruntime", "onnxruntime-gpu") if _installed(p)]
    purpose = "calibrate, check, extract, profile"
    if not both:
        return Finding("onnxruntime", "not installed", False, purpose, 'pip install "phreg-deploy[cpu]"')
    if len(both) == 2:
        return Finding(
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu both installed: they overwrite each other",
            False,
            purpose,
            "pip uninstall onnxruntime onnxruntime-gpu, then install one",
        )
    try:
        import onnxruntime
    except ImportError as error:
        return Finding(
            "onnxruntime",
            f"{both[0]} {_installed(both[0])}; import fails: {error}",
            False,
            purpose,
            f"pip install --force-reinstall {both[0]}",
        )
    return Finding("onnxruntime", f"{both[0]} {onnxruntime.__version__}; CPU usable", True, purpose)


def _openvino() -> Finding:
    """What the CPU plugin itself says of the processor: names of instruction sets do not tell what it makes of them."""
    purpose = "the fastest backend on most processors"
    if _installed("openvino") is None:
        return Finding("openvino", "not installed", False, purpose, 'pip install "phreg-deploy[openvino]"')
    try:
        import openvino

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:1]
        return Finding(
            "openvino", f"fails: {''.join(first)[:120]}", False, purpose, "pip install --force-reinstall openvino"
        )
    kinds = ", ".join(kind for kind in ("FP32", "BF16", "INT8") if kind in able)
    return Finding("openvino", f"openvino {_installed('openvino')}; CPU usable in {kinds}", True, purpose)


def _driver() -> Finding:
    """The driver is asked itself: lists of providers say nothing about whether one works."""
    purpose = "distill on a GPU"
    try:
        driver = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return Finding(
            "NVIDIA driver", "not found", False, purpose, "none needed for the CPU; else install the NVIDIA driver"
        )
    count, number = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0)
    if code:
        return Finding(
            "NVIDIA driver",
            f"present, but cuInit fails with error {code}",
            False,
            purpose,
            "check nvidia-smi; inside a container, run it with --gpus all",
        )
    driver.cuDriverGetVersion(ctypes.byref(number))
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Finding(
        "NVIDIA driver",
        f"CUDA {number.value // 1000}.{number.value % 1000 // 10}, {count.value} GPUs",
        count.value > 0,
        purpose,
    )
