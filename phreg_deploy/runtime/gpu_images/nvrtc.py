"""Compile CUDA source for one GPU by NVRTC, NVIDIA's compiler at run time; that needs no GPU and no nvcc."""

from __future__ import annotations

import importlib
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError

EXTRA = (
    'Run: pip install "phreg-deploy[gpu-images]" (for CUDA 12 add "cuda-python<13" "cuda-toolkit<13"; on a Jetson it '
    "comes with nvidia-jetpack)"
)


def compile_source(source: str, name: str, architecture: int) -> bytes:
    """Compile to machine code (CUBIN) for an architecture, e.g. 87 for Orin.

    For an architecture that is newer than NVRTC the result is PTX of the newest one that it knows, which the driver
    compiles.

    Raises:
        BackendMissing: cuda-python or NVRTC is not installed, or NVRTC no longer compiles for this GPU.
        PhregError: the source does not compile.
    """
    nvrtc = _load()
    known = [int(a) for a in _call(nvrtc, "nvrtcGetSupportedArchs")]
    version = ".".join(str(part) for part in _call(nvrtc, "nvrtcVersion"))
    below = [a for a in known if a <= architecture]
    if not below:
        raise BackendMissing(
            f"NVRTC: version {version} compiles for GPUs from {min(known) / 10} on; got {architecture / 10}. "
            'Install an older one: pip install "cuda-toolkit[nvrtc]<13"'
        )
    exact = architecture in known
    target = f"--gpu-architecture={'sm' if exact else 'compute'}_{max(below)}"
    program = _call(nvrtc, "nvrtcCreateProgram", source.encode(), f"{name}.cu".encode(), 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, 1, [target.encode()])
        if int(status):
            log = _bytes(nvrtc, program, "nvrtcGetProgramLog").decode(errors="replace").strip("\0 \n")
            raise PhregError(f"NVRTC: {version} cannot compile {name}.cu for {target}: {log[:500]}")
        return _bytes(nvrtc, program, "nvrtcGetCUBIN" if exact else "nvrtcGetPTX")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bytes(nvrtc: Any, program: Any, name: str) -> bytes:
    # cuda-python writes into the bytes that it gets.
    data = b"\0" * int(_call(nvrtc, f"{name}Size", program))
    _call(nvrtc, name, program, data)
    return data


def _call(nvrtc: Any, name: str, *arguments: Any) -> Any:
    """Call a function of NVRTC and return its result without the status."""
    try:
        status, *results = getattr(nvrtc, name)(*arguments)
    except RuntimeError as error:
        # cuda-python raises this if there is no libnvrtc.
        raise BackendMissing(f"NVRTC: it cannot be loaded: {str(error).splitlines()[0]} {EXTRA}") from None
    if int(status):
        raise PhregError(f"NVRTC: {name} failed with error {int(status)} ({getattr(status, 'name', status)}).")
    return None if not results else results[0] if len(results) == 1 else results


def _load() -> Any:
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise BackendMissing(f"NVRTC: cuda-python cannot be imported ({error}). {EXTRA}") from None
