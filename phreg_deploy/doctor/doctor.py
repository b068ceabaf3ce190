"""Find out what is installed and usable on this machine, and what to type for each part that is not."""

from __future__ import annotations

import platform

from phreg_deploy.doctor.gpu import find_gpu_parts
from phreg_deploy.doctor.system import Finding, Part, attempt, installed
from phreg_deploy.runtime.backends.instructions import eight_bits


def diagnose() -> list[Finding]:
    """Check every part that a command needs, in the order of the pipeline."""
    return [
        Part("python", "everything").usable(f"{platform.python_version()} on {platform.machine()}"),
        _torch(),
        _package("onnx", "export, calibrate"),
        _package("onnxscript", "export"),
        _onnxruntime(),
        _openvino(),
        Part("8-bit instructions", "INT8 on the processor").usable(str(eight_bits())),
        *find_gpu_parts(),
    ]


def _package(package: str, purpose: str) -> Finding:
    version, part = installed(package), Part(package, purpose)
    return (
        part.unusable("not installed", 'pip install "phreg-deploy[export]"')
        if version is None
        else part.usable(version)
    )


def _torch() -> Finding:
    """Import timm in a separate process, which keeps this one light.

    timm imports torchvision, and each wheel of torchvision fits one build of torch only.
    """
    part = Part("torch + timm", "distill, export")
    missing = [p for p in ("torch", "timm", "safetensors") if installed(p) is None]
    if missing:
        return part.unusable(f"{', '.join(missing)} not installed", 'pip install "phreg-deploy[distill]"')
    versions = f"torch {installed('torch')}, timm {installed('timm')}"
    worked, output = attempt("import timm, torch; print(torch.cuda.is_available())", 120)
    if worked:
        return part.usable(f"{versions}; CUDA {'usable' if output.endswith('True') else 'not usable'}")
    reason, fix = f"import fails: {output[:120]}", 'pip install --force-reinstall "phreg-deploy[distill]"'
    if "timed out" in output:
        reason, fix = "importing them takes over two minutes", "run: python -c 'import timm'"
    elif "torchvision::nms" in output:
        reason, fix = "torchvision was built against another torch", "pip install --force-reinstall torch torchvision"
    return part.unusable(f"{versions}; {reason}", fix)


def _onnxruntime() -> Finding:
    part = Part("onnxruntime", "calibrate, check, extract, profile")
    packages = [p for p in ("onnxruntime", "onnxruntime-gpu") if installed(p)]
    if not packages:
        return part.unusable("not installed", 'pip install "phreg-deploy[cpu]"')
    if len(packages) == 2:
        return part.unusable(
            "onnxruntime and onnxruntime-gpu both installed: they overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one",
        )
    (package,) = packages
    try:
        import onnxruntime
    except ImportError as error:
        state = f"{package} {installed(package)}; import fails: {error}"
        return part.unusable(state, f"pip install --force-reinstall {package}")
    return part.usable(f"{package} {onnxruntime.__version__}; CPU usable")


def _openvino() -> Finding:
    """Ask OpenVINO's CPU plugin which precisions it uses; the processor's instruction sets do not tell."""
    part, version = Part("openvino", "the fastest backend on most processors"), installed("openvino")
    if version is None:
        return part.unusable("not installed", 'pip install "phreg-deploy[openvino]"')
    try:
        import openvino

        from phreg_deploy.runtime.backends.openvino_exact import saturates

        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        clipped = saturates()
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:1]
        return part.unusable(f"fails: {''.join(first)[:120]}", "pip install --force-reinstall openvino")
    kinds = ", ".join(kind for kind in ("FP32", "BF16", "INT8") if kind in capabilities)
    if clipped:
        kinds += " (INT8 in float32: its 8-bit kernels saturate on this processor)"
    return part.usable(f"openvino {version}; CPU usable in {kinds}")
