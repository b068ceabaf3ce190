"""Replay ONNX Runtime's CUDA graph on bound buffers, for bundles of one size and one batch."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda, Stream
from phreg_deploy.runtime.gpu.memory import DeviceBuffer, PinnedBuffer

# Tensor -> shape and type.
Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class Staging(Closing):
    """Buffers of one session at the fixed addresses that its CUDA graph uses; one call at a time.

    The session needs ``enable_cuda_graph``: ONNX Runtime then records the graph in its first runs with a binding.
    """

    def __init__(self, cuda: Cuda, session: Any, inputs: Layout, outputs: Layout) -> None:
        self.cuda, self._session, self.inputs, self.outputs = cuda, session, inputs, outputs
        self.lock = threading.Lock()
        self._things: list[Closing] = []
        self._host: dict[str, PinnedBuffer] = {}
        self._device: dict[str, DeviceBuffer] = {}
        try:
            self._stream = self._own(Stream(cuda))
            for name, (shape, dtype) in {**inputs, **outputs}.items():
                size = int(np.prod(shape)) * dtype.itemsize
                self._host[name] = self._own(PinnedBuffer(cuda, size))
                self._device[name] = self._own(DeviceBuffer(cuda, size))
            self._binding = session.io_binding()
            for name, (shape, dtype) in inputs.items():
                self._binding.bind_input(name, "cuda", cuda.index, dtype, shape, self._device[name].pointer)
            for name, (shape, dtype) in outputs.items():
                self._binding.bind_output(name, "cuda", cuda.index, dtype, shape, self._device[name].pointer)
        except BaseException:
            self.close()
            raise

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on host arrays of the bound shapes, and return host arrays."""
        with self.lock, self.cuda.selected():
            handle = self._stream.handle
            for name, value in feed.items():
                np.copyto(self._host[name].view(value.shape, value.dtype), value)
                self.cuda.copy(
                    self._device[name].pointer, self._host[name].pointer, value.nbytes, "HostToDevice", handle
                )
            # The session runs on another stream.
            self._stream.wait()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            for name in self.outputs:
                self.cuda.copy(
                    self._host[name].pointer, self._device[name].pointer, self._host[name].size, "DeviceToHost", handle
                )
            self._stream.wait()
            return {name: self._host[name].view(shape, dtype).copy() for name, (shape, dtype) in self.outputs.items()}

    def _own(self, thing: Any) -> Any:
        self._things.append(thing)
        return thing

    def close(self) -> None:
        self._binding = self._session = None
        while self._things:
            self._things.pop().close()
