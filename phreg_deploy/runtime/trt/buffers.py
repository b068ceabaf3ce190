"""The memory of one execution context: device memory at aligned addresses, and page-locked memory to copy from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.closing import Closing, close_all
from phreg_deploy.runtime.gpu.cuda import Cuda, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer, PinnedBuffer


class TensorBuffers(Closing):
    """A device buffer for each tensor, and a page-locked one for each that the host reads or writes. They only grow.

    cudaMalloc aligns to 256 bytes at least, as ``setTensorAddress`` of NvInferRuntime.h demands.

    Args:
        stream: the stream that every copy is queued in.
        dtypes: of each tensor.
    """

    def __init__(self, cuda: Cuda, stream: Stream, dtypes: dict[str, np.dtype[Any]]) -> None:
        self.cuda, self.stream, self.dtypes = cuda, stream, dtypes
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def size(self, name: str) -> int:
        """Bytes of a tensor of the present shape."""
        return int(np.prod(self.shapes[name])) * self.dtypes[name].itemsize

    def fits(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether the device buffers are large enough for tensors of these shapes."""
        sizes = {name: int(np.prod(shape)) * self.dtypes[name].itemsize for name, shape in shapes.items()}
        return all(name in self._device and self._device[name].size >= size for name, size in sizes.items())

    def grow(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make room for tensors of these shapes on the device; nothing in flight may use a buffer that is replaced."""
        self.shapes = dict(shapes)
        for name in shapes:
            if name not in self._device or self._device[name].size < self.size(name):
                if name in self._device:
                    self._device.pop(name).close()
                self._device[name] = DeviceBuffer(self.cuda, self.size(name))

    def pin(self, names: Iterable[str]) -> None:
        """Make room for tensors of the present shapes in page-locked memory."""
        for name in names:
            if name not in self._host or self._host[name].size < self.size(name):
                if name in self._host:
                    self._host.pop(name).close()
                self._host[name] = PinnedBuffer(self.cuda, self.size(name))

    def address(self, name: str) -> int:
        """The device address of a tensor."""
        return self._device[name].pointer

    def view(self, name: str) -> np.ndarray:
        """The page-locked memory of a tensor, as an array of the present shape."""
        return self._host[name].view(self.shapes[name], self.dtypes[name])

    def write(self, name: str, value: np.ndarray) -> None:
        """Write a tensor into its page-locked memory. Raises ``PhregError`` for another type."""
        if self.dtypes[name] != value.dtype:
            raise PhregError(f"engine: got {name} in {value.dtype}, expected {self.dtypes[name]}.")
        np.copyto(self.view(name), value)

    def upload(self, name: str) -> None:
        """Queue the copy of a tensor from page-locked memory to the device."""
        self._copy(self.address(name), self._host[name].pointer, name, "HostToDevice")

    def download(self, name: str) -> None:
        """Queue the copy of a tensor from the device to page-locked memory."""
        self._copy(self._host[name].pointer, self.address(name), name, "DeviceToHost")

    def fetch(self, name: str, source: int) -> None:
        """Queue the copy of a tensor from another address on the device."""
        self._copy(self.address(name), source, name, "DeviceToDevice")

    def hand_over(self, name: str, target: int) -> None:
        """Queue the copy of a tensor to another address on the device."""
        self._copy(target, self.address(name), name, "DeviceToDevice")

    def _copy(self, target: int, source: int, name: str, kind: str) -> None:
        self.cuda.copy(target, source, self.size(name), kind, self.stream.handle)

    def close(self) -> None:
        close_all([*self._device.values(), *self._host.values()])
