"""Check what a GPU needs: driver, JetPack, cuda-python, TensorRT, ONNX Runtime's providers, NVML.

This process imports none of NVIDIA's modules and opens no provider of ONNX Runtime: without its host,
``libonnxruntime_providers_cuda.so`` 1.31.1 crashes the process if all its libraries are there. The libraries that a
provider needs are read from its ELF header.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phreg_deploy.doctor.driver import DRIVER, Driver, find_driver
from phreg_deploy.doctor.system import VENV, Finding, Jetson, Part, System, read_jetson
from phreg_deploy.runtime.gpu.libraries import needed_libraries
from phreg_deploy.runtime.gpu.trt_library import WHEELS, mend_wheel

NEEDLESS = "not needed without a GPU"
OLDEST_TENSORRT = (10, 3)
TENSORRT_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
# Part -> the commands that need it.
PARTS = {
    "cuda-python": "build, and serve on TensorRT",
    "NVRTC": "serve frames of any size that are on the GPU",
    "TensorRT": "build, and serve on TensorRT",
    "onnxruntime on CUDA": "serve on onnxruntime-cuda",
    "onnxruntime on TensorRT": "TensorRT inside ONNX Runtime",
    "nvidia-ml-py": "power and clocks in profile",
}
# Part -> the extra that installs it, unless it is "gpu".
EXTRAS = {"cuda-python": "cuda", "NVRTC": "gpu-images", "TensorRT": "trt", "nvidia-ml-py": "cuda"}


def find_gpu_parts(system: System | None = None) -> list[Finding]:
    """Check the driver, JetPack on a Jetson, and the parts that need them. Never raises; on Windows the driver only."""
    system = system or System()
    try:
        driver = find_driver(system)
    except Exception as error:
        # The driver's library may be in any state.
        driver = Driver(DRIVER.unusable(_describe_error(error), "reinstall the NVIDIA driver"), present=True)
    if sys.platform == "win32":
        return [driver.finding]
    jetson = read_jetson(system.root)
    if not driver.present and jetson is None:
        return [driver.finding, *(Part(name, purpose).unusable(NEEDLESS) for name, purpose in PARTS.items())]
    findings = [driver.finding]
    if jetson is not None:
        if not driver.present:
            findings = [replace(driver.finding, mend="flash JetPack; start a container with --runtime nvidia")]
        findings.append(Part("JetPack", "the versions that fit this Jetson").usable(str(jetson)))
    checks: dict[str, Callable[[Part], Finding]] = {
        "cuda-python": lambda part: _cuda_python(part, system, driver),
        "NVRTC": lambda part: _nvrtc(part, system, driver, jetson),
        "TensorRT": lambda part: _tensorrt(part, system, driver, jetson),
        "onnxruntime on CUDA": lambda part: _provider(part, system, driver, "cuda"),
        "onnxruntime on TensorRT": lambda part: _provider(part, system, driver, "tensorrt"),
        "nvidia-ml-py": lambda part: _nvml(part, system),
    }
    for name, check in checks.items():
        part = Part(name, PARTS[name])
        try:
            findings.append(check(part))
        except Exception as error:
            # A broken installation may raise anything, and is a finding.
            fix = f'pip install --force-reinstall "phreg-deploy[{EXTRAS.get(name, "gpu")}]"'
            findings.append(part.unusable(_describe_error(error), fix))
    return findings


def _describe_error(error: Exception) -> str:
    return f"cannot be asked: {type(error).__name__}: {str(error)[:120]}"


def _cuda_python(part: Part, system: System, driver: Driver) -> Finding:
    # The newest version that this driver can serve.
    older = f'pip install "cuda-python<{driver.major + 1}"'
    version = system.version("cuda-bindings") or system.version("cuda-python")
    if version is None:
        fix = 'pip install "phreg-deploy[cuda]"'
        return part.unusable("not installed", f'{fix} "cuda-python<13"' if driver.major == 12 else fix)
    major = int(version.split(".")[0])
    if driver.major and major > driver.major:
        state = f"{version} needs a driver of CUDA {major}, and this one is of CUDA {driver.major}"
        return part.unusable(state, older)
    worked, output = system.attempt("import cuda.bindings.runtime; print('ok')")
    if not worked:
        state = f"{version}; import fails: {output[:120]}"
        return part.unusable(state, older.replace("install", "install --force-reinstall"))
    return driver.needed_for(part, version)


def _nvrtc(part: Part, system: System, driver: Driver, jetson: Jetson | None) -> Finding:
    """NVRTC, whose machine code a driver of an older major version may refuse."""
    fitting = f"<{driver.major + 1}" if driver.major else ""
    fix = "sudo apt install nvidia-jetpack" if jetson else f'pip install "cuda-toolkit[nvrtc]{fitting}"'
    worked, output = system.attempt(
        "import cuda.bindings.nvrtc; print(*cuda.bindings.nvrtc.nvrtcVersion()[1:], sep='.')"
    )
    if not worked:
        return part.unusable(f"cannot be loaded: {output[:120]}", fix)
    if driver.major and int(output.split(".")[0]) > driver.major:
        return part.unusable(f"{output} is newer than the driver, which is of CUDA {driver.major}", fix)
    return driver.needed_for(part, output)


def _tensorrt(part: Part, system: System, driver: Driver, jetson: Jetson | None) -> Finding:
    fix = f"sudo apt install nvidia-jetpack; {VENV}" if jetson else 'pip install "phreg-deploy[trt]"'
    for module in ("tensorrt", "tensorrt_lean"):
        worked, output = system.attempt(f"import {module}; print({module}.__version__)")
        if worked or f"No module named '{module}'" not in output:
            break
    else:
        hidden = sorted(str(p.parent) for p in system.root.glob("usr/lib/python3*/dist-packages/tensorrt"))
        if hidden:
            return part.unusable(f"is in {hidden[0]}, which this environment does not see", VENV)
        return part.unusable("not installed", fix)
    if not worked:
        again = fix if jetson else 'pip install --force-reinstall "phreg-deploy[trt]"'
        return part.unusable(f"{module} is there, but its import fails: {output[:120]}", again)
    version = tuple(int(number) for number in re.findall(r"\d+", output))
    if version < OLDEST_TENSORRT:
        newer = "update JetPack to 6.1 or newer" if jetson else fix
        return part.unusable(f"{output}, expected at least 10.3", newer)
    refusal = jetson.refusal(version) if jetson else None
    if refusal:
        return part.unusable(f"{output}: {refusal}", f"pip uninstall {module}; {fix}")
    if module == "tensorrt_lean":
        state = f"lean {output}: runs engines built with compatibility version, builds none"
        return driver.needed_for(part, state)
    wheel = None if jetson else next((n for n in WHEELS if system.version(f"tensorrt-cu{n}-bindings")), None)
    if wheel and driver.major and wheel > driver.major:
        state = f"{output} is built for CUDA {wheel}, and the driver is of CUDA {driver.major}"
        return part.unusable(state, mend_wheel(wheel, driver.major))
    missing = [name for stem in TENSORRT_LIBRARIES if not system.finds(name := f"{stem}.so.{version[0]}")]
    if missing:
        return part.unusable(f"{output}, without {', '.join(missing)}", fix)
    lacking = _missing_builder_resource(system, version[0], driver)
    if lacking is not None:
        state = f"{output}: runs engines, builds none: {lacking}"
        return Finding(part.name, state, bool(driver.architectures), part.purpose, fix)
    return driver.needed_for(part, output)


def _missing_builder_resource(system: System, major: int, driver: Driver) -> str | None:
    """Why TensorRT cannot build; None if it can, or if the files do not show it.

    The builder needs libnvinfer_builder_resource: one file up to 10.15; from 10.16 on one for each
    architecture (sm75 to sm120, ptx). Orin, SM 8.7, loads sm86.
    """
    folders = [folder for folder in system.folders if (folder / f"libnvinfer.so.{major}").exists()]
    if not folders:
        return None
    names = [p.name for folder in folders for p in folder.glob(f"libnvinfer_builder_resource*.so.{major}*")]
    if not names:
        return f"no libnvinfer_builder_resource in {folders[0]}"
    split = [int(number) for name in names for number in re.findall(r"_sm(\d+)\.", name)]
    if not split or len(split) < len(names):
        # One of the files is for all architectures, or ptx.
        return None
    lacking = [a for a in driver.architectures if not any(n // 10 == a // 10 and n <= a for n in split)]
    return f"no libnvinfer_builder_resource for SM {lacking[0] / 10:.1f} in {folders[0]}" if lacking else None


def _provider(part: Part, system: System, driver: Driver, kind: str) -> Finding:
    """Check the libraries of a provider: ONNX Runtime lists it without them, and then silently computes on the CPU."""
    version = system.version("onnxruntime-gpu")
    if version is None:
        on_cpu = system.version("onnxruntime") is not None
        other = "onnxruntime, the CPU build" if on_cpu else "not installed"
        if system.processor == "aarch64":
            return part.unusable(f"{other}; PyPI has no onnxruntime-gpu for aarch64, use TensorRT")
        first = "pip uninstall onnxruntime, then " if on_cpu else ""
        return part.unusable(other, f'{first}pip install "phreg-deploy[gpu]"')
    library = f"onnxruntime/capi/libonnxruntime_providers_{kind}.so"
    files = [file for site in system.sites if (file := site / library).is_file()]
    if not files:
        return part.unusable(f"onnxruntime-gpu {version}, built without this provider")
    needed = _provider_libraries(files[0])
    cuda = max((int(name.rsplit(".", 1)[1]) for name in needed if name.startswith("libcudart.so.")), default=0)
    state, missing = f"onnxruntime-gpu {version}", [name for name in needed if not system.finds(name)]
    if driver.major and cuda > driver.major:
        state = f"{state} is built for CUDA {cuda}, and the driver is of CUDA {driver.major}"
        return part.unusable(state, f"install an NVIDIA driver of CUDA {cuda}")
    if missing:
        wheels = ['"onnxruntime-gpu[cuda,cudnn]"'] if any(name.startswith("libcu") for name in missing) else []
        wheels += ['"tensorrt>=10.3,<11"'] if any(name.startswith("libnv") for name in missing) else []
        apart = "in an environment of its own: " if kind == "tensorrt" and system.version("tensorrt") else ""
        fix = f"{apart}pip install {' '.join(wheels)}"
        return part.unusable(f"{state} lists it, but lacks {', '.join(missing)}", fix)
    return driver.needed_for(part, f"{state}; its libraries are found")


def _provider_libraries(provider: Path) -> list[str]:
    """NVIDIA's libraries that a provider needs, without the driver's."""
    needed = [
        name for name in needed_libraries(provider) if name.startswith(("libcu", "libnv")) and name != "libcuda.so.1"
    ]
    # 1.31.1 opens cuDNN late, for convolutions, of which the patch embedding is one; the plugins are opened late too.
    if not any(name.startswith("libcudnn.") for name in needed):
        needed.append("libcudnn.so.9")
    return needed + [name.replace("infer", "infer_plugin") for name in needed if name.startswith("libnvinfer.")]


def _nvml(part: Part, system: System) -> Finding:
    version = system.version("nvidia-ml-py")
    if version is None:
        return part.unusable("not installed", 'pip install "phreg-deploy[cuda]"')
    if not system.finds("libnvidia-ml.so.1"):
        state = f"{version}; the driver's libnvidia-ml.so.1 is not found"
        return part.unusable(state, "install the NVIDIA driver's utilities")
    return part.usable(version)
