"""CUDA through cuda-python: a device, its streams, events and graphs, each freed once; errors as sentences."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.spec import Stored

# cudaErrorMemoryAllocation
OUT_OF_MEMORY = 2


@dataclass(frozen=True)
class Gpu(Stored):
    """A device as the driver describes it.

    ``architecture``: compute capability times ten, e.g. 87 for Orin. ``memory``: bytes. ``driver``: the CUDA version
    that it supports, e.g. 12060.
    """

    index: int
    name: str
    architecture: int
    memory: int
    multiprocessors: int
    integrated: bool
    driver: int

    @property
    def kind(self) -> str:
        """The name with the number of multiprocessors: every Orin has the name "Orin"."""
        return f"{self.name}, {self.multiprocessors} multiprocessors"


class Cuda:
    """The CUDA runtime on one device. Each thread must call it inside ``selected``, or after ``use``.

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
        # This starts the device, and so tells early if that fails.
        with self.selected():
            facts = self.call("cudaGetDeviceProperties", index)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.gpu = Gpu(
            index,
            name=name.strip("\x00 "),
            architecture=10 * int(facts.major) + int(facts.minor),
            memory=int(facts.totalGlobalMem),
            multiprocessors=int(facts.multiProcessorCount),
            integrated=bool(facts.integrated),
            driver=int(self.call("cudaDriverGetVersion")),
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its result without the status.

        Raises:
            BackendMissing: no driver or no device.
            PhregError: any other status.
        """
        return self._call(self.api, name, arguments)

    def call_driver(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA driver, as ``call`` does."""
        return self._call(_load_driver(), name, arguments)

    def _call(self, api: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        try:
            status, *results = getattr(api, name)(*arguments)
        except RuntimeError as error:
            # cuda-python raises this if there is no libcuda.so.1.
            raise BackendMissing(
                f"GPU: {error}; install the NVIDIA driver, and start a container with --gpus all."
            ) from None
        code = int(status)
        if code == 0:
            return None if not results else results[0] if len(results) == 1 else results
        if code == OUT_OF_MEMORY:
            raise PhregError(
                f"GPU: out of memory in {name}. Use a smaller batch, close other extractors, or build with a smaller "
                "--workspace."
            )
        reason = f"{name} failed with CUDA error {code} ({getattr(status, 'name', status)})"
        if name == "cudaGetDeviceCount":
            raise BackendMissing(
                f"GPU: {reason}; there is no usable NVIDIA driver or GPU here. `phreg-deploy doctor` says more."
            )
        raise PhregError(f"GPU: {reason}.")

    def use(self) -> None:
        """Select the device for the calling thread."""
        self.call("cudaSetDevice", self.index)

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Select the device for the calling thread in the block, and afterwards the one that was selected before.

        A device that this process does not use is not selected again: cudaSetDevice would start it, which takes
        hundreds of megabytes of its memory.
        """
        before = int(self.call("cudaGetDevice"))
        self.use()
        try:
            yield
        finally:
            if before != self.index and _is_started(before):
                # After an error of the device every call fails; the first one was raised.
                with contextlib.suppress(PhregError):
                    self.call("cudaSetDevice", before)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory: free, total."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def copy(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
        """Queue a copy of ``size`` bytes; ``kind`` "HostToDevice", "DeviceToHost" or "DeviceToDevice"."""
        self.call(
            "cudaMemcpyAsync", target, source, size, getattr(self.api.cudaMemcpyKind, f"cudaMemcpy{kind}"), stream
        )


class Stream(Closing):
    """A stream that does not wait for the default stream; ``handle`` is its ``cudaStream_t`` as a number."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._stream: Any = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def wait(self) -> None:
        """Block until all queued work is done; raise the error of any of it."""
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def begin(self) -> None:
        """Start to record the work that follows, instead of running it."""
        mode = self.cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.call("cudaStreamBeginCapture", self.handle, mode)

    def end(self) -> Graph:
        """End the recording."""
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
    """A mark in a stream; the device took the time between two marks, unless ``timing`` is False, which is faster."""

    def __init__(self, cuda: Cuda, timing: bool = True) -> None:
        self.cuda = cuda
        if timing:
            self._event: Any = cuda.call("cudaEventCreate")
        else:
            self._event = cuda.call("cudaEventCreateWithFlags", cuda.api.cudaEventDisableTiming)
        self.handle = int(self._event)

    def record(self, stream: int) -> None:
        self.cuda.call("cudaEventRecord", self._event, stream)

    def order(self, earlier: int, later: int) -> None:
        """Let the stream ``later`` wait for the work queued in ``earlier``; the host does not wait."""
        self.record(earlier)
        self.cuda.call("cudaStreamWaitEvent", later, self.handle, 0)

    def wait(self) -> None:
        self.cuda.call("cudaEventSynchronize", self._event)

    def since(self, earlier: Event) -> float:
        """Milliseconds from ``earlier`` to this event; the device must have reached both."""
        return float(self.cuda.call("cudaEventElapsedTime", earlier._event, self._event))

    def close(self) -> None:
        if self._event is not None:
            event, self._event = self._event, None
            self.cuda.call("cudaEventDestroy", event)


def _load() -> Any:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise BackendMissing(
            'GPU: cuda-python is not installed. Run: pip install "phreg-deploy[cuda]" '
            '(for CUDA 12: pip install "cuda-python<13").'
        )
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendMissing(
            f"GPU: cuda-python cannot be imported ({error}). Reinstall it: pip install --force-reinstall cuda-python"
        ) from None
    return runtime


def _load_driver() -> Any:
    from cuda.bindings import driver

    return driver


def _is_started(index: int) -> bool:
    """Whether this process uses a device already."""
    status, _, active = _load_driver().cuDevicePrimaryCtxGetState(index)
    return int(status) == 0 and bool(active)
