"""The kernel of ``resample.cu`` on one GPU, and the arguments of its launches."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu_images.nvrtc import compile_source

SOURCE = Path(__file__).with_name("resample.cu")
# Threads of a block along x and y: a warp reads neighbouring pixels of a row.
BLOCK = (32, 8)


class Pass(ctypes.Structure):
    """The arguments of one pass, as the structure of that name in ``resample.cu`` lays them out."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("source_pitch", ctypes.c_longlong),
        ("chroma_pitch", ctypes.c_longlong),
        ("target_pitch", ctypes.c_longlong),
        ("source_step", ctypes.c_int),
        ("along_x", ctypes.c_int),
        ("first", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("left", ctypes.c_int),
        ("top", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("swap", ctypes.c_int),
        ("fill", ctypes.c_int * 3),
        ("yuv", ctypes.c_int * 6),
    )


class ResampleKernel(Closing):
    """The kernel, compiled for the GPU and loaded; any thread may launch it. The caller selects the GPU.

    Raises:
        BackendMissing: NVRTC is not installed, or does not compile for this GPU.
        PhregError: the driver refuses the code.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        code = compile_source(SOURCE.read_text(), SOURCE.stem, cuda.gpu.architecture)
        try:
            self._module: Any = cuda.call_driver("cuModuleLoadData", code)
        except PhregError as error:
            raise PhregError(
                f"{error} The driver is of CUDA {cuda.gpu.driver // 1000}.{cuda.gpu.driver % 1000 // 10}, and may be "
                "older than NVRTC; install NVRTC of the driver's major version: "
                f'pip install "cuda-toolkit[nvrtc]<{cuda.gpu.driver // 1000 + 1}"'
            ) from None
        self._function = cuda.call_driver("cuModuleGetFunction", self._module, SOURCE.stem.encode())

    def launch(self, arguments: Pass, stream: int) -> None:
        """Queue a pass; ``arguments`` may be changed afterwards."""
        grid = (-(-arguments.columns // BLOCK[0]), -(-arguments.rows // BLOCK[1]))
        # cuLaunchKernel takes an array of the addresses of the arguments, and copies what lies there.
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self.cuda.call_driver(
            "cuLaunchKernel", self._function, *grid, 1, *BLOCK, 1, 0, stream, ctypes.addressof(addresses), 0
        )

    def close(self) -> None:
        """Unload the kernel; nothing in flight may use it."""
        if self._module is not None:
            module, self._module = self._module, None
            self.cuda.call_driver("cuModuleUnload", module)
