"""What a GPU needs: driver, JetPack, cuda-python, TensorRT, ONNX Runtime's providers, NVML; asked, never assumed from lists.

Nothing of NVIDIA's is imported into this process, and no provider of ONNX Runtime is opened in it: opened without its host,
``libonnxruntime_providers_cuda.so`` 1.31.1 crashes the process as soon as all its libraries are there. What it needs is read
from its header instead.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from phreg_deploy.doctor.system import VENV, Finding, Jetson, System, read_jetson
from phreg_deploy.runtime.gpu.libraries import needed_libraries

NEEDLESS = "not needed without a GPU"
OLDEST_TENSORRT = (10, 3)
TENSORRT_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
PARTS = {  # part: what it is for
    "cuda-python": "build, and serve on TensorRT",
    "TensorRT": "build, and serve on TensorRT",
    "onnxruntime on CUDA": "serve on onnxruntime-cuda",
    "onnxruntime on TensorRT": "TensorRT inside ONNX Runtime",
    "nvidia-ml-py": "power and clocks in profile",
}
EXTRAS = {
    "cuda-python": "cuda",
    "TensorRT": "trt",
    "nvidia-ml-py": "cuda",
}  # part: the extra that brings it, else "gpu"
CUDA_ERRORS = {  # CUresult of cuInit: why, and what to do
    34: ("a stub library was found", "take the folder stubs out of LD_LIBRARY_PATH"),
    100: ("it sees no GPU", "check nvidia-smi; inside a container, run it with --gpus all"),
    802: ("the system is not ready", "sudo systemctl start nvidia-fabricmanager"),
    803: ("library and kernel module are of different versions", "reboot; inside a container, update its libcuda"),
    804: ("a compatibility libcuda is in the way", "take the folder cuda-compat out of LD_LIBRARY_PATH"),
}


@dataclass(frozen=True)
class Driver:
    """``cuda``: the version that it supports, as 12060, 0 where it did not say. ``architectures``: of each usable GPU, as 87."""

    finding: Finding
    present: bool = False
    cuda: int = 0
    architectures: tuple[int, ...] = ()

    @property
    def major(self) -> int:
        return self.cuda // 1000


def find_gpu_parts(around: System | None = None) -> list[Finding]:
    """The driver, JetPack on a Jetson, and what stands on them. Never raises; on Windows the driver only."""
    around = around or System()
    try:
        driver = _find_driver(around)
    except Exception as error:  # of any library, in any state
        driver = Driver(_failed("NVIDIA driver", "everything on a GPU", error), present=True)
    if sys.platform == "win32":
        return [driver.finding]
    jetson = read_jetson(around.root)
    if not driver.present and jetson is None:
        return [driver.finding, *(Finding(part, NEEDLESS, False, purpose) for part, purpose in PARTS.items())]
    makers: dict[str, Callable[[], Finding]] = {
        "cuda-python": lambda: _cuda_python(around, driver),
        "TensorRT": lambda: _tensorrt(around, driver, jetson),
        "onnxruntime on CUDA": lambda: _provider(around, driver, "cuda"),
        "onnxruntime on TensorRT": lambda: _provider(around, driver, "tensorrt"),
        "nvidia-ml-py": lambda: _nvml(around),
    }
    findings = [driver.finding]
    if jetson is not None:
        if not driver.present:
            findings = [replace(driver.finding, mend="flash JetPack; start a container with --runtime nvidia")]
        findings.append(Finding("JetPack", str(jetson), True, "the versions that fit this Jetson"))
    for part, make in makers.items():
        try:
            findings.append(make())
        except Exception as error:  # a broken installation is a finding, whatever it raises
            findings.append(_failed(part, PARTS[part], error))
    return findings


def _failed(part: str, purpose: str, error: Exception) -> Finding:
    mend = f'pip install --force-reinstall "phreg-deploy[{EXTRAS.get(part, "gpu")}]"'
    state = f"cannot be asked: {type(error).__name__}: {str(error)[:120]}"
    return Finding(part, state, False, purpose, mend if part in PARTS else "reinstall the NVIDIA driver")


def _find_driver(around: System) -> Driver:
    """The driver is asked itself: lists of providers say nothing about whether one works."""
    part, purpose = "NVIDIA driver", "everything on a GPU"
    try:
        cuda = around.library("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return Driver(
            Finding(part, "not found", False, purpose, "none needed for the CPU; else install the NVIDIA driver")
        )
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))  # answers before cuInit, and where that fails
    release = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code:
        why, mend = CUDA_ERRORS.get(
            code, ("", "check nvidia-smi and reboot; inside a container, run it with --gpus all")
        )
        state = f"{release}, but cuInit fails with error {code}{': ' + why if why else ''}"
        return Driver(Finding(part, state, False, purpose, mend), True, number.value)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    words, architectures = [], []
    for index in range(count.value):
        said, architecture = _describe(cuda, index)
        words.append(said)
        architectures += [architecture] if architecture else []
    state = f"{release}, {count.value} GPU{'' if count.value == 1 else 's'}{': ' if words else ''}{'; '.join(words)}"
    usable = bool(architectures)
    return Driver(
        Finding(part, state, usable, purpose, None if usable else CUDA_ERRORS[100][1]),
        True,
        number.value,
        tuple(architectures),
    )


def _describe(cuda: Any, index: int) -> tuple[str, int]:
    """One GPU in words, and its architecture; 0 where the driver refuses to say."""
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    codes = [
        cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    ]
    if any(codes):
        return f"GPU {index} cannot be asked (error {next(code for code in codes if code)})", 0
    text = name.value.decode(errors="replace").strip()
    return f"{text}, SM {major.value}.{minor.value}, {memory.value / 2**30:.1f} GiB", 10 * major.value + minor.value


def _cuda_python(around: System, driver: Driver) -> Finding:
    part, purpose = "cuda-python", PARTS["cuda-python"]
    older = f'pip install "cuda-python<{driver.major + 1}"'  # the newest that this driver can serve
    found = around.version("cuda-bindings") or around.version("cuda-python")
    if found is None:
        mend = 'pip install "phreg-deploy[cuda]"'
        return Finding(
            part, "not installed", False, purpose, f'{mend} "cuda-python<13"' if driver.major == 12 else mend
        )
    major = int(found.split(".")[0])
    if driver.major and major > driver.major:
        state = f"{found} needs a driver of CUDA {major}, and this one is of CUDA {driver.major}"
        return Finding(part, state, False, purpose, older)
    worked, said = around.attempt("import cuda.bindings.runtime; print('ok')")
    if not worked:
        return Finding(
            part,
            f"{found}; import fails: {said[:120]}",
            False,
            purpose,
            older.replace("install", "install --force-reinstall"),
        )
    return _on_gpu(part, found, purpose, driver)


def _on_gpu(part: str, state: str, purpose: str, driver: Driver) -> Finding:
    """What is in order but for the GPU under it: an object that is made is no proof that it works."""
    return Finding(
        part, state if driver.architectures else f"{state}; waits for a GPU", bool(driver.architectures), purpose
    )


def _tensorrt(around: System, driver: Driver, jetson: Jetson | None) -> Finding:
    part, purpose = "TensorRT", PARTS["TensorRT"]
    mend = f"sudo apt install nvidia-jetpack; {VENV}" if jetson else 'pip install "phreg-deploy[trt]"'
    for module in ("tensorrt", "tensorrt_lean"):
        worked, said = around.attempt(f"import {module}; print({module}.__version__)")
        if worked or f"No module named '{module}'" not in said:
            break
    else:
        hidden = sorted(str(p.parent) for p in around.root.glob("usr/lib/python3*/dist-packages/tensorrt"))
        if hidden:
            return Finding(part, f"is in {hidden[0]}, which this environment does not see", False, purpose, VENV)
        return Finding(part, "not installed", False, purpose, mend)
    if not worked:
        again = mend if jetson else 'pip install --force-reinstall "phreg-deploy[trt]"'
        return Finding(part, f"{module} is there, but its import fails: {said[:120]}", False, purpose, again)
    numbers = tuple(int(n) for n in re.findall(r"\d+", said))
    if numbers < OLDEST_TENSORRT:
        return Finding(
            part,
            f"{said}, expected at least 10.3",
            False,
            purpose,
            "update JetPack to 6.1 or newer" if jetson else mend,
        )
    refused = jetson.refusal(numbers) if jetson else None
    if refused:
        return Finding(part, f"{said}: {refused}", False, purpose, f"pip uninstall {module}; {mend}")
    if module == "tensorrt_lean":
        return _on_gpu(
            part, f"lean {said}: runs engines built with compatibility version, builds none", purpose, driver
        )
    missing = [name for stem in TENSORRT_LIBRARIES if not around.finds(name := f"{stem}.so.{numbers[0]}")]
    if missing:
        return Finding(part, f"{said}, without {', '.join(missing)}", False, purpose, mend)
    resource = _resource(around, numbers[0], driver)
    if resource is not None:
        return Finding(
            part, f"{said}: runs engines, builds none: {resource}", bool(driver.architectures), purpose, mend
        )
    return _on_gpu(part, said, purpose, driver)


def _resource(around: System, major: int, driver: Driver) -> str | None:
    """Why the builder has nothing to build with; None where it has, or where nobody can tell.

    Up to 10.15 it is one file; 10.16 and 11 split it by architecture (sm75 ... sm120, ptx), and Orin, SM 8.7, loads sm86.
    """
    homes = [folder for folder in around.folders if (folder / f"libnvinfer.so.{major}").exists()]
    if not homes:
        return None
    names = [p.name for folder in homes for p in folder.glob(f"libnvinfer_builder_resource*.so.{major}*")]
    if not names:
        return f"no libnvinfer_builder_resource in {homes[0]}"
    split = [int(n) for name in names for n in re.findall(r"_sm(\d+)\.", name)]
    if not split or len(split) < len(names):  # a whole one, or ptx
        return None
    lacking = [a for a in driver.architectures if not any(n // 10 == a // 10 and n <= a for n in split)]
    return f"no libnvinfer_builder_resource for SM {lacking[0] / 10:.1f} in {homes[0]}" if lacking else None


def _provider(around: System, driver: Driver, kind: str) -> Finding:
    """ONNX Runtime lists its providers even where they cannot load, and then computes on the CPU without a word."""
    part = {"cuda": "onnxruntime on CUDA", "tensorrt": "onnxruntime on TensorRT"}[kind]
    purpose, found = PARTS[part], around.version("onnxruntime-gpu")
    if found is None:
        other = "onnxruntime, the CPU build" if around.version("onnxruntime") else "not installed"
        if around.processor == "aarch64":
            return Finding(part, f"{other}; PyPI has no onnxruntime-gpu for aarch64, use TensorRT", False, purpose)
        first = "pip uninstall onnxruntime, then " if around.version("onnxruntime") else ""
        return Finding(part, other, False, purpose, f'{first}pip install "phreg-deploy[gpu]"')
    files = [
        f for site in around.sites if (f := site / f"onnxruntime/capi/libonnxruntime_providers_{kind}.so").is_file()
    ]
    if not files:
        return Finding(part, f"onnxruntime-gpu {found}, built without this provider", False, purpose)
    needed = [n for n in needed_libraries(files[0]) if n.startswith(("libcu", "libnv")) and n != "libcuda.so.1"]
    if not any(n.startswith("libcudnn.") for n in needed):
        needed.append("libcudnn.so.9")  # 1.31.1 opens it late, for convolutions: the patch embedding is one
    needed += [n.replace("infer", "infer_plugin") for n in needed if n.startswith("libnvinfer.")]  # opened late as well
    built = max((int(n.rsplit(".", 1)[1]) for n in needed if n.startswith("libcudart.so.")), default=0)
    state, missing = f"onnxruntime-gpu {found}", [n for n in needed if not around.finds(n)]
    if driver.major and built > driver.major:
        state = f"{state} is built for CUDA {built}, and the driver is of CUDA {driver.major}"
        return Finding(part, state, False, purpose, f"install an NVIDIA driver of CUDA {built}")
    if missing:
        wheels = ['"onnxruntime-gpu[cuda,cudnn]"'] if any(n.startswith("libcu") for n in missing) else []
        wheels += ['"tensorrt>=10.3,<11"'] if any(n.startswith("libnv") for n in missing) else []
        apart = "in an environment of its own: " if kind == "tensorrt" and around.version("tensorrt") else ""
        mend = f"{apart}pip install {' '.join(wheels)}"
        return Finding(part, f"{state} lists it, but lacks {', '.join(missing)}", False, purpose, mend)
    return _on_gpu(part, f"{state}; its libraries are found", purpose, driver)


def _nvml(around: System) -> Finding:
    part, purpose, found = "nvidia-ml-py", PARTS["nvidia-ml-py"], around.version("nvidia-ml-py")
    if found is None:
        return Finding(part, "not installed", False, purpose, 'pip install "phreg-deploy[cuda]"')
    if not around.finds("libnvidia-ml.so.1"):
        return Finding(
            part,
            f"{found}; the driver's libnvidia-ml.so.1 is not found",
            False,
            purpose,
            "install the NVIDIA driver's utilities",
        )
    return Finding(part, found, True, purpose)
