"""What is installed, what is usable rather than merely listed, and the line that mends what is not."""

from __future__ import annotations

import platform

from phreg_deploy.doctor.gpu import find_gpu_parts
from phreg_deploy.doctor.system import Finding, attempt, installed
from phreg_deploy.runtime.backends.instructions import eight_bits


def diagnose() -> list[Finding]:
    """Every part that a command needs, in the order of the pipeline."""
    return [
        _python(),
        _torch(),
        _plain("onnx", "export", "export, calibrate"),
        _plain("onnxscript", "export", "export"),
        _onnxruntime(),
        _openvino(),
        _eight_bits(),
        *find_gpu_parts(),
    ]


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.machine()}", True, "everything")


def _eight_bits() -> Finding:
    return Finding("8-bit instructions", str(eight_bits()), True, "INT8 on the processor")


def _plain(package: str, extra: str, purpose: str) -> Finding:
    found = installed(package)
    if found is None:
        return Finding(package, "not installed", False, purpose, f'pip install "phreg-deploy[{extra}]"')
    return Finding(package, found, True, purpose)


def _torch() -> Finding:
    """timm imports torchvision, whose wheel fits one build of torch only; asked in a process of its own, so that this one stays light."""
    missing = [p for p in ("torch", "timm", "safetensors") if installed(p) is None]
    purpose = "distill, export"
    if missing:
        return Finding(
            "torch + timm", f"{', '.join(missing)} not installed", False, purpose, 'pip install "phreg-deploy[distill]"'
        )
    versions = f"torch {installed('torch')}, timm {installed('timm')}"
    worked, said = attempt("import timm, torch; print(torch.cuda.is_available())", 120)
    if worked:
        cuda = "usable" if said.endswith("True") else "not usable"
        return Finding("torch + timm", f"{versions}; CUDA {cuda}", True, purpose)
    mend = 'pip install --force-reinstall "phreg-deploy[distill]"'
    if "timed out" in said:
        said, mend = "importing them takes over two minutes", "run: python -c 'import timm'"
    elif "torchvision::nms" in said:
        said, mend = "torchvision was built against another torch", "pip install --force-reinstall torch torchvision"
    else:
        said = f"import fails: {said[:120]}"
    return Finding("torch + timm", f"{versions}; {said}", False, purpose, mend)


def _onnxruntime() -> Finding:
    both = [p for p in ("onnxruntime", "onnxruntime-gpu") if installed(p)]
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
            f"{both[0]} {installed(both[0])}; import fails: {error}",
            False,
            purpose,
            f"pip install --force-reinstall {both[0]}",
        )
    return Finding("onnxruntime", f"{both[0]} {onnxruntime.__version__}; CPU usable", True, purpose)


def _openvino() -> Finding:
    """What the CPU plugin itself says of the processor: names of instruction sets do not tell what it makes of them."""
    purpose = "the fastest backend on most processors"
    if installed("openvino") is None:
        return Finding("openvino", "not installed", False, purpose, 'pip install "phreg-deploy[openvino]"')
    try:
        import openvino

        from phreg_deploy.runtime.backends.openvino_exact import saturates

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        clipped = saturates()
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:1]
        return Finding(
            "openvino", f"fails: {''.join(first)[:120]}", False, purpose, "pip install --force-reinstall openvino"
        )
    kinds = ", ".join(kind for kind in ("FP32", "BF16", "INT8") if kind in able)
    if clipped:
        kinds += " (INT8 in float32: its 8-bit kernels saturate on this processor)"
    return Finding("openvino", f"openvino {installed('openvino')}; CPU usable in {kinds}", True, purpose)
