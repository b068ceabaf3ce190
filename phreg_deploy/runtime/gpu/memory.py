"""Memory of a GPU, and page-locked memory of the host, each freed once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda


class DeviceBuffer(Closing):
    """Device memory of ``size`` bytes at ``pointer``."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.cuda, self.size = cuda, size
        self.pointer = int(cuda.call("cudaMalloc", max(1, size)))

    def close(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self.cuda.call("cudaFree", pointer)


class PinnedBuffer(Closing):
    """Page-locked host memory of ``size`` bytes, from which copies are asynchronous; ``view`` shows it as an array."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.cuda, self.size = cuda, size
        self.pointer = int(cuda.call("cudaMallocHost", max(1, size)))
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(self.pointer))

    def view(self, shape: Iterable[int], dtype: np.dtype[Any]) -> np.ndarray:
        shape = tuple(shape)
        return self._bytes[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def close(self) -> None:
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            self.cuda.call("cudaFreeHost", pointer)
