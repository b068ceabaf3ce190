"""CUDA by cuda-python: a device, streams, events, buffers and graphs that are freed once, and errors in words. Never torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.spec import Stored

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@dataclass(frozen=True)
class Gpu(Stored):
    """A device as the driver describes it. ``architecture``: compute capability times ten, e.g. 87 for Orin. ``memory``: bytes."""

    index: int
    name: str
    architecture: int
    memory: int
    multiprocessors: int
    integrated: bool
    driver: int  # CUDA version that the driver supports, e.g. 12060


class Cuda:
    """The CUDA runtime on one device. Each thread that calls it must have called ``use``.

    Raises:
        BackendMissing: cuda-python is not installed, there is no driver, or no such device.
    """

    def __init__(self, index: int = 0, runtime: Any = None) -> None:
        self.api = runtime if runtime is not None else _load()
        count = self.call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise BackendMissing(
                f"GPU: got device {index}, expected one of 0 to {count - 1}."
                if count
                else "GPU: the driver lists no NVIDIA GPU."
            )
        self.index = index
        self.use()
        facts = self.call("cudaGetDeviceProperties", index)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.gpu = Gpu(
            index, name.strip("\x00 "), 10 * int(facts.major) + int(facts.minor), int(facts.totalGlobalMem),
            int(facts.multiProcessorCount), bool(facts.integrated), int(self.call("cudaDriverGetVersion")),
        )  # fmt: skip

    def call(self, name: str, *arguments: Any) -> Any:
        """One call of the CUDA runtime; its result, without the status.

        Raises:
            BackendMissing: no driver or no device. PhregError: everything else, out of memory with what to do.
        """
        try:
            status, *results = getattr(self.api, name)(*arguments)
        except RuntimeError as error:  # cuda-python where libcuda.so.1 is not there
            raise BackendMissing(
                f"GPU: {error}; install the NVIDIA driver, and start a container with --gpus all."
            ) from None
        code = int(status)
        if code == 0:
            return None if not results else results[0] if len(results) == 1 else results
        if code == OUT_OF_MEMORY:
            raise PhregError(
                f"GPU: out of memory in {name}. Use a smaller batch, close other extractors, or build with a smaller --workspace."
            )
        reason = f"{name} failed with CUDA error {code} ({getattr(status, 'name', status)})"
        if name == "cudaGetDeviceCount":
            raise BackendMissing(
                f"GPU: {reason}; there is no usable NVIDIA driver or GPU here. `phreg-deploy doctor` says more."
            )
        raise PhregError(f"GPU: {reason}.")

    def use(self) -> None:
        """Make the device the calling thread's own."""
        self.call("cudaSetDevice", self.index)

    def free_memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def copy(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        """Queue a copy of ``size`` bytes; ``kind`` "HostToDevice", "DeviceToHost" or "DeviceToDevice"."""
        self.call(
            "cudaMemcpyAsync", target, source, size, getattr(self.api.cudaMemcpyKind, f"cudaMemcpy{kind}"), stream
        )


class Stream(Closing):
    """A stream of its own that does not wait for the default one; ``handle`` is what others call a ``cudaStream_t``."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._stream: Any = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def wait(self) -> None:
        """Block until everything that was queued is done; errors of queued work surface here."""
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def begin(self) -> None:
        """Record what follows instead of running it."""
        mode = self.cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.call("cudaStreamBeginCapture", self.handle, mode)

    def end(self) -> Graph:
        return Graph(self.cuda, self.cuda.call("cudaStreamEndCapture", self.handle))

    def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self.cuda.call("cudaStreamDestroy", int(stream))


class Graph(Closing):
    """A recorded sequence of work that one call starts."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self.cuda = cuda
        try:
            self._graph: Any = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.call("cudaGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        self.cuda.call("cudaGraphLaunch", self._graph, stream)

    def close(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self.cuda.call("cudaGraphExecDestroy", graph)


class Event(Closing):
    """A mark in a stream; the time between two is what the device took."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._event: Any = cuda.call("cudaEventCreate")
        self.handle = int(self._event)

    def record(self, stream: int) -> None:
        self.cuda.call("cudaEventRecord", self._event, stream)

    def order(self, earlier: int, later: int) -> None:
        """Let the stream ``later`` wait for what is queued in ``earlier``; the host waits for nothing."""
        self.record(earlier)
        self.cuda.call("cudaStreamWaitEvent", later, self.handle, 0)

    def wait(self) -> None:
        self.cuda.call("cudaEventSynchronize", self._event)

    def since(self, earlier: Event) -> float:
        """Milliseconds from ``earlier`` to here; both must have happened."""
        return float(self.cuda.call("cudaEventElapsedTime", earlier._event, self._event))

    def close(self) -> None:
        if self._event is not None:
            event, self._event = self._event, None
            self.cuda.call("cudaEventDestroy", event)


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
    """Page-locked host memory of ``size`` bytes, which copies reach without a detour; ``view`` shows it as an array."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        import ctypes

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


def _load() -> Any:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise BackendMissing(
            'GPU: cuda-python is not installed. Run: pip install "phreg-deploy[cuda]" (for CUDA 12: pip install "cuda-python<13").'
        )
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendMissing(
            f"GPU: cuda-python cannot be imported ({error}). Reinstall it: pip install --force-reinstall cuda-python"
        ) from None
    return runtime
