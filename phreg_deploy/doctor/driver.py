"""Start NVIDIA's driver, and describe it and its GPUs."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from phreg_deploy.doctor.system import Finding, Part, System

DRIVER = Part("NVIDIA driver", "everything on a GPU")
# CUresult of cuInit -> the cause, and what to do.
CUDA_ERRORS = {
    34: ("a stub library was found", "take the folder stubs out of LD_LIBRARY_PATH"),
    100: ("it sees no GPU", "check nvidia-smi; inside a container, run it with --gpus all"),
    802: ("the system is not ready", "sudo systemctl start nvidia-fabricmanager"),
    803: ("library and kernel module are of different versions", "reboot; inside a container, update its libcuda"),
    804: ("a compatibility libcuda is in the way", "take the folder cuda-compat out of LD_LIBRARY_PATH"),
}


@dataclass(frozen=True)
class Driver:
    """The driver. ``cuda``: the version that it supports, e.g. 12060, 0 if unknown. ``architectures``: e.g. 87."""

    finding: Finding
    present: bool = False
    cuda: int = 0
    architectures: tuple[int, ...] = ()

    @property
    def major(self) -> int:
        return self.cuda // 1000

    def needed_for(self, part: Part, state: str) -> Finding:
        """The finding of a part that is in order: it is usable only with a GPU."""
        return part.usable(state) if self.architectures else part.unusable(f"{state}; waits for a GPU")


def find_driver(system: System) -> Driver:
    """Start the driver, because ONNX Runtime's list of providers does not say whether it works."""
    try:
        cuda = system.library("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return Driver(DRIVER.unusable("not found", "none needed for the CPU; else install the NVIDIA driver"))
    version, count = ctypes.c_int(), ctypes.c_int()
    # This call works before cuInit, and also if cuInit fails.
    cuda.cuDriverGetVersion(ctypes.byref(version))
    release = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code:
        cause, fix = CUDA_ERRORS.get(
            code, ("", "check nvidia-smi and reboot; inside a container, run it with --gpus all")
        )
        state = f"{release}, but cuInit fails with error {code}{': ' + cause if cause else ''}"
        return Driver(DRIVER.unusable(state, fix), True, version.value)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = [_describe_gpu(cuda, index) for index in range(count.value)]
    architectures = tuple(architecture for _, architecture in gpus if architecture)
    names = "; ".join(text for text, _ in gpus)
    state = f"{release}, {count.value} GPU{'' if count.value == 1 else 's'}{': ' if names else ''}{names}"
    finding = DRIVER.usable(state) if architectures else DRIVER.unusable(state, CUDA_ERRORS[100][1])
    return Driver(finding, True, version.value, architectures)


def _describe_gpu(cuda: Any, index: int) -> tuple[str, int]:
    """A GPU as text, and its architecture; 0 if the driver refuses to describe it."""
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    codes = [
        cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDeviceGetName(name, len(name), device),
        # 75 and 76 are COMPUTE_CAPABILITY_MAJOR and MINOR.
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    ]
    if any(codes):
        return f"GPU {index} cannot be asked (error {next(code for code in codes if code)})", 0
    text = name.value.decode(errors="replace").strip()
    return f"{text}, SM {major.value}.{minor.value}, {memory.value / 2**30:.1f} GiB", 10 * major.value + minor.value
